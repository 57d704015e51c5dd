"""What the evaluation says about the voxels it takes as the truth, and what it refuses: one line, exit code 2."""

import sys

import numpy as np
import pytest
from diff2to3._cli import main
from diff2to3.data._store import Store
from diff2to3.eval._cli import _say_rule


@pytest.mark.parametrize(
    ("rules", "embedded", "said", "warned"),
    [
        (["sampled"], True, "rule sampled\n", False),
        (["exact"], True, "rule exact\n", True),
        (["exact", "sampled"], True, "rule exact and sampled\n", True),
        (["exact"], False, "rule exact\n", False),
    ],
)
def test_the_rule_of_the_voxels_is_said(tmp_path, capsys, rules, embedded, said, warned):
    store = Store(tmp_path)
    for rule in rules:
        store.write("voxels", rule, {"coords": np.zeros((1, 3), np.uint8)}, {"grid_size": 32, "rule": rule})
    _say_rule(store, rules, embedded)
    error = capsys.readouterr().err
    assert said in error
    assert ("warning" in error) == warned


@pytest.fixture
def refused(monkeypatch, capsys):
    """Runs a command that has to fail, and gives the line that says why."""

    for name in ("hear_signals", "ignore_signals"):  # this process keeps its own
        monkeypatch.setattr(f"diff2to3._cli.{name}", lambda: None)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["diff2to3", "eval", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main()
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("diff2to3: error: ")]
        assert stop.value.code == 2
        assert len(lines) == 1
        return lines[0]

    return run


def test_refusals(refused, tmp_path, eval_data):
    empty, nothing = tmp_path / "empty", tmp_path / "nothing"
    empty.mkdir()
    data = ("--data", eval_data.root)
    assert "not a data set" in refused("generation", "--data", empty)
    assert "no rendered object in split 'other'" in refused("reconstruction", *data, "--split", "other")
    assert "no usable config.json for FluxFeaturesConfig" in refused(
        "reconstruction", *data, "--extractor", empty, "--vae", empty
    )
    assert "expected one of diff2to3, TRELLIS" in refused("generation", *data, "--assets", empty, "--method", "Magic")
    assert "no asset for 2 of 2 objects" in refused("generation", *data, "--assets", empty, "--method", "lgm")
    assert "--method needs --assets" in refused("generation", *data, "--method", "LGM")
    assert "expected frame=" in refused(
        "generation", *data, "--assets", empty, "--method", "LGM", "--convention", "left=+x"
    )
    assert "lie on one axis" in refused(
        "generation", *data, "--assets", empty, "--method", "LGM", "--convention", "front=-y"
    )
    assert f"{nothing}: no such file" in refused("generation", *data, "--lpips", nothing)
    assert "expected NETWORK=WEIGHTS" in refused("generation", *data, "--weights", "resnet=here")
    assert "vgg weights" in refused("generation", *data, "--weights", f"vgg={nothing}")
    assert "--source DIR" in refused("generation", *data)
    (tmp_path / "protocol.json").write_text('{"objects": []}')
    assert "not a protocol: objects" in refused("generation", *data, "--protocol", tmp_path / "protocol.json")
    assert "not a readable YAML file" in refused("ablation", nothing)
    (tmp_path / "a.yaml").write_text("rows: 3")
    assert "data: Field required" in refused("ablation", tmp_path / "a.yaml")


@pytest.mark.parametrize(
    ("name", "content"), [("LGM", b"ply\nformat binary_little_endian 1.0\nelement vert"), ("LGM", b"")]
)
def test_truncated_asset(refused, tmp_path, eval_data, eval_assets, name, content):
    for row in eval_data.objects("val"):
        (tmp_path / f"{row['id']}.ply").write_bytes(content)
    line = refused(
        "generation", "--data", eval_data.root, "--source", eval_assets, "--assets", tmp_path, "--method", name
    )
    assert str(tmp_path) in line
    assert ".ply" in line
