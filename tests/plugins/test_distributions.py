"""Third-party distributions, really installed: one is swapped in by name, a broken one disturbs nobody, two clash."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from diff2to3 import Pipeline
from PIL import Image, ImageDraw

HERE = Path(__file__).parent
EXAMPLES = HERE.parents[1] / "examples"
FOLDERS = {
    "good": EXAMPLES / "plugin-feature-extractor",
    "backbone": EXAMPLES / "plugin-backbone",
    "broken": HERE / "broken",
    "duplicate": HERE / "duplicate",
}


@pytest.fixture(scope="session")
def installed(tmp_path_factory):
    """Installs some of `FOLDERS`; returns the environment that sees them."""
    uv = os.environ.get("UV") or shutil.which("uv")
    if uv is None:
        pytest.fail("uv is needed to install the test distributions: pip install uv")

    def install(*names):
        target = tmp_path_factory.mktemp("site")
        command = [uv, "pip", "install", "--quiet", "--no-deps", "--python", sys.executable, "--target", target]
        subprocess.run([*command, *(FOLDERS[name] for name in names)], check=True)
        return {**os.environ, "PYTHONPATH": str(target), "OMP_NUM_THREADS": "1"}

    return install


def diff2to3(environment, *arguments):
    command = [sys.executable, "-m", "diff2to3", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=280)


@pytest.fixture
def ball(tmp_path):
    image = Image.new("RGBA", (96, 80))
    ImageDraw.Draw(image).ellipse((20, 10, 70, 60), fill=(200, 30, 40, 255))
    image.save(tmp_path / "ball.png")
    return tmp_path / "ball.png"


def test_swap_by_name(installed, micro_pipeline, ball, tmp_path):
    """The pipeline runs with a third party's feature extractor, chosen by name, beside a broken plugin."""
    environment = installed("good", "broken")
    options = ["--pipeline", micro_pipeline, "--format", "ply", "--json"]
    swapped = diff2to3(environment, "generate", ball, *options, "-o", tmp_path / "a", "--feature-extractor", "acme-dct")
    assert swapped.returncode == 0, swapped.stderr
    own = Pipeline.from_pretrained(micro_pipeline, device="cpu")
    own(ball).save(tmp_path / "own.ply")
    manifest = json.loads(swapped.stdout)
    assert manifest["components"] == {"feature_extractor": "acme-dct"}
    assert manifest["config"]["roles"]["feature_extractor"] == {
        "name": "acme-dct",
        "config": {"image_size": own.feature_extractor.image_size},  # the other models know the token grid it makes
    }
    assert "feature_extractor" not in manifest["weights"]
    assert (tmp_path / "a" / "ball.ply").read_bytes() != (tmp_path / "own.ply").read_bytes()


def test_listing_shows_the_good_and_the_broken_one(installed):
    environment = installed("good", "broken")
    rows = json.loads(diff2to3(environment, "plugins", "--json").stdout)
    good = [row for row in rows if row["distribution"] == "acme-features"]
    assert good == [
        {
            "role": "feature_extractor",
            "name": "acme-dct",
            "distribution": "acme-features",
            "version": "1.2.0",
            "target": "acme_features:DctFeatures",
            "available": True,
            "reason": None,
        }
    ]
    [broken] = [row for row in rows if row["distribution"] == "broken-features"]
    assert not broken["available"]
    assert "a_module_that_nobody_has" in broken["reason"]
    assert {"flux-features", "smdit", "sparse-vae", "gs-render"} <= {row["distribution"] for row in rows}
    text = diff2to3(environment, "plugins").stdout
    assert "acme-dct" in text
    assert "no: failed to load: ModuleNotFoundError" in text


def test_clash_of_names(installed, micro_pipeline, ball, tmp_path):
    environment = installed("good", "duplicate")
    base = [
        "generate",
        ball,
        "--pipeline",
        micro_pipeline,
        "--format",
        "ply",
        "-o",
        tmp_path / "out",
        "--feature-extractor",
    ]
    clash = diff2to3(environment, *base, "acme-dct")
    assert clash.returncode == 2
    assert "acme-features 1.2.0 and other-features 0.1.0" in clash.stderr
    assert "'other-features:acme-dct'" in clash.stderr
    assert not (tmp_path / "out").exists()
    code = "from diff2to3._plugins import registry as r; print(r().find('feature_extractor', '{}:acme-dct').label)"
    for name, version in (("other-features", "0.1.0"), ("acme-features", "1.2.0")):
        command = [sys.executable, "-c", code.format(name)]
        chosen = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
        assert chosen.stdout.strip() == f"acme-dct ({name} {version})"


def test_unknown_name_mentions_the_broken_one(installed, micro_pipeline, ball):
    environment = installed("good", "broken")
    options = ["--pipeline", micro_pipeline, "--format", "ply", "--feature-extractor", "dinov9"]
    result = diff2to3(environment, "generate", ball, *options)
    assert result.returncode == 2
    for words in (
        "no feature_extractor named 'dinov9'",
        "acme-dct (acme-features 1.2.0)",
        "failed to load: broken-features",
    ):
        assert words in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("name", ["good", "backbone"])
def test_templates_keep_the_contract(installed, name, tmp_path):
    """As their authors would check them: with the contract tests of diff2to3."""
    environment = installed(name)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", tmp_path, "-c", os.devnull]
    result = subprocess.run(
        [*command, FOLDERS[name] / "tests"], capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=280
    )
    assert result.returncode == 0, result.stdout
    assert "passed" in result.stdout


@pytest.mark.parametrize("name", ["good", "backbone"])
def test_templates_are_short(name):
    """What an author writes is under 60 lines besides packaging; the documentation says so."""
    lines = [line for path in FOLDERS[name].glob("src/**/*.py") for line in path.read_text().splitlines()]
    assert sum(bool(line.strip()) for line in lines) < 60


def test_backbone_from_the_template_in_a_pipeline(installed, micro_pipeline, ball, tmp_path):
    """An object of the class plays the role; by name it has no weights, which is said."""
    environment = installed("backbone")
    options = ["--pipeline", micro_pipeline, "--format", "ply", "-o", tmp_path / "out"]
    named = diff2to3(environment, "generate", ball, *options, "--backbone", "acme-deepset")
    assert named.returncode == 2
    assert "'acme-deepset' has no weights of its own" in named.stderr
    code = f"""
from acme_flow import DeepSetFlow, DeepSetFlowConfig
from diff2to3 import Pipeline
own = Pipeline.from_pretrained({str(micro_pipeline)!r}, device="cpu").backbone.config
sizes = dict(latent_channels=own.latent_channels, condition_channels=own.condition_channels, grid_size=own.grid_size)
pipe = Pipeline.from_pretrained({str(micro_pipeline)!r}, device="cpu", backbone=DeepSetFlow(DeepSetFlowConfig(**sizes)))
print(len(pipe({str(ball)!r}, steps=2).gaussians))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=280)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) > 0
