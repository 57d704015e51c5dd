"""Pipeline directories: every way in which one can be broken is named."""

import json
import shutil

import pytest
import torch
from diff2to3 import Pipeline
from diff2to3 import _locate as locate
from diff2to3 import _store as store
from diff2to3._errors import ComponentError, PipelineFormatError
from diff2to3._locate import file_sha256
from safetensors.torch import load_file, save_file


@pytest.fixture
def folder(micro_pipeline, tmp_path):
    return shutil.copytree(micro_pipeline, tmp_path / "broken")


@pytest.fixture
def unhashed(folder):
    """One whose files may be changed: it does not say what they were."""
    path = folder / "pipeline.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"weights": {}}))
    return folder


def load(folder):
    return Pipeline.from_pretrained(folder, device="cpu")


def edit(path, change):
    state = load_file(path)
    change(state)
    save_file(state, path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("output.bias"), r"backbone\.safetensors: missing tensors: output\.bias"),
        (lambda s: s.update(extra=torch.zeros(2)), r"unexpected tensors: extra"),
        (lambda s: s.update({"output.bias": torch.zeros(3)}), r"output\.bias has shape \[3\], expected \[8\]"),
        (lambda s: s["output.bias"].fill_(float("nan")), r"output\.bias holds 8 values that are NaN"),
        (lambda s: s["output.bias"][:1].fill_(float("inf")), r"output\.bias holds 1 values"),
    ],
)
def test_wrong_tensors_are_named(unhashed, change, message):
    edit(unhashed / "backbone.safetensors", change)
    with pytest.raises(PipelineFormatError, match=message):
        load(unhashed)


@pytest.mark.parametrize("keep", [0.0, 0.001, 0.5, 0.999])
def test_truncated_weights(unhashed, keep):
    path = unhashed / "structure.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(PipelineFormatError, match=r"structure\.safetensors is damaged or truncated"):
        load(unhashed)


@pytest.mark.parametrize("role", ["feature_extractor", "structure", "backbone", "latent_decoder"])
def test_changed_weights(folder, role):
    """One bit of one number, which leaves a whole safetensors file with finite tensors."""
    path = folder / f"{role}.safetensors"
    saved, data = file_sha256(path), bytearray(path.read_bytes())
    data[-2] ^= 1
    path.write_bytes(data)
    expected = (
        f"{path} is damaged, truncated or another file: its SHA-256 is {file_sha256(path)[:12]}..., pipeline.json says "
        f"{saved[:12]}...; delete {path} and get it again"
    )
    with pytest.raises(PipelineFormatError) as caught:
        load(folder)
    assert str(caught.value) == expected


def test_weights_that_the_pipeline_does_not_know(folder):
    path = folder / "pipeline.json"
    config = json.loads(path.read_text())
    del config["weights"]["backbone.safetensors"]
    path.write_text(json.dumps(config))
    with pytest.raises(PipelineFormatError, match=r"backbone\.safetensors .* pipeline\.json says no such file"):
        load(folder)


def test_hashes_of_a_replaced_component_do_not_count(folder):
    (folder / "backbone.safetensors").write_bytes(b"damaged")
    own = load_backbone(folder)
    pipeline = Pipeline.from_pretrained(folder, device="cpu", backbone=own)
    saved = store.read_config(folder).weights
    assert pipeline.weight_hashes()["structure"] == saved["structure.safetensors"]
    assert pipeline.weight_hashes()["backbone"] == store.state_sha256(own) != saved["backbone.safetensors"]
    assert pipeline.config.weights == {}


def load_backbone(folder):
    from smdit import SMDiT, SMDiTConfig

    with torch.random.fork_rng():
        return SMDiT(SMDiTConfig(**store.read_config(folder).roles["backbone"].config))


def test_saving_over_another_pipeline_leaves_no_hash_of_it(folder):
    before = store.read_config(folder).weights
    load(folder).save_pretrained(folder, dtype="float32")
    after = store.read_config(folder).weights
    assert before.keys() == after.keys()
    assert not set(before.values()) & set(after.values())
    assert load(folder).weight_hashes() == {name.partition(".")[0]: value for name, value in after.items()}


def test_missing_weights(folder):
    (folder / "latent_decoder.safetensors").unlink()
    with pytest.raises(PipelineFormatError, match=r"latent_decoder\.safetensors: no such file"):
        load(folder)


def test_weights_for_a_component_without_any(folder):
    save_file({"a": torch.zeros(1)}, folder / "renderer.safetensors")
    with pytest.raises(PipelineFormatError, match="takes no weights"):
        load(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 2}, "format_version"),
        ({"colour": "red"}, "colour"),
        ({"frame": "sideways"}, "frame"),
        ({"roles": {}}, "no component for feature_extractor"),
        ({"sampler": {"steps": 0}}, "steps"),
        ({"name": 3}, "name"),
        ({"weights": {"backbone.safetensors": "abc"}}, r"weights\.backbone\.safetensors"),
    ],
)
def test_wrong_config(folder, change, message):
    path = folder / "pipeline.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(PipelineFormatError, match=message):
        load(folder)


def test_wrong_component_config(folder):
    path = folder / "pipeline.json"
    config = json.loads(path.read_text())
    config["roles"]["backbone"]["config"]["num_wheels"] = 4
    path.write_text(json.dumps(config))
    with pytest.raises(ComponentError, match=r"backbone 'smdit': num_wheels: .*got 4"):
        load(folder)


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", "\xff"])
def test_config_that_is_no_json(folder, text):
    (folder / "pipeline.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(PipelineFormatError, match=r"pipeline\.json"):
        load(folder)


def test_components_that_do_not_fit(folder):
    path = folder / "pipeline.json"
    config = json.loads(path.read_text())
    config["roles"]["latent_decoder"]["config"]["grid_size"] = 32
    path.write_text(json.dumps(config))
    with pytest.raises(ComponentError, match="16 and 32"):
        load(folder)


def test_empty_folder_and_unknown_names(tmp_path):
    with pytest.raises(PipelineFormatError, match=r"has no pipeline\.json"):
        load(tmp_path)
    with pytest.raises(PipelineFormatError, match=r"no pipeline 'nonsense'.*embedded"):
        load("nonsense")
    with pytest.raises(PipelineFormatError, match="no pipeline"):
        load("./not/there")


def test_saving_refuses_what_loading_would(tmp_path, micro_pipeline):
    config = store.read_config(micro_pipeline)
    module = torch.nn.Linear(2, 2)
    module.weight.data[0, 0] = 1e6  # too large for float16
    with pytest.raises(ValueError, match=r"backbone: tensor weight is not finite as torch\.float16"):
        store.save_pipeline(tmp_path / "a", config, {"backbone": module})
    with pytest.raises(ValueError, match="no such roles: wheel"):
        store.save_pipeline(tmp_path / "a", config, {"wheel": module})
    store.save_pipeline(tmp_path / "a", config, {"backbone": module}, dtype="float32")
    assert load_file(tmp_path / "a" / "backbone.safetensors")["weight"][0, 0] == 1e6
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["backbone.safetensors", "pipeline.json"]


def test_saving_without_loss(tmp_path, micro_pipeline):
    """Half precision for the tensors that it holds exactly."""
    module = torch.nn.Linear(2, 2)
    module.weight.data = torch.tensor([[0.5, -2.0], [2.0**-24, 0.0]])  # the smallest number of half precision too
    module.bias.data = torch.tensor([0.1, 1e6])
    store.save_pipeline(tmp_path, store.read_config(micro_pipeline), {"backbone": module}, dtype=None)
    saved = load_file(tmp_path / "backbone.safetensors")
    assert {name: tensor.dtype for name, tensor in saved.items()} == {"weight": torch.float16, "bias": torch.float32}
    assert all(torch.equal(saved[name].float(), tensor) for name, tensor in module.state_dict().items())


def test_embedded_pipelines_are_complete():
    for name in locate.embedded_names():
        config = store.read_config(locate.EMBEDDED / name)
        assert config.description
        files = {path.name: file_sha256(path) for path in (locate.EMBEDDED / name).glob("*.safetensors")}
        assert config.weights == files
        Pipeline.from_pretrained(name, device="cpu")
