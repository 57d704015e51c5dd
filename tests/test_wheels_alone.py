"""Every package works alone, from its wheel, with nothing but what it declares.

Members of a workspace can import each other's dependencies by accident. So each wheel is built from its sdist and
installed into a new, empty virtual environment, next to the wheels of the workspace packages that it requires and
links to the installed files of the third-party distributions that it requires, each with all that those require in
turn. Linking instead of downloading keeps this quick and offline. Then every public name is imported, the package does
a small piece of its real work, and, once `TOOLS` are linked besides, its own tests run there.
"""

import os
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

pytestmark = pytest.mark.long
ROOT = Path(__file__).resolve().parents[1]
WORKSPACE = {
    "marope": "marope",
    "gs-render": "gs_render",
    "flux-features": "flux_features",
    "sparse-vae": "sparse_vae",
    "smdit": "smdit",
    "diff2to3": "diff2to3",
}

#: Bytes that a wheel may have; its sdist may have as many.
BUDGET = {
    "marope": 30_000,
    "gs-render": 110_000,
    "flux-features": 60_000,
    "sparse-vae": 80_000,
    "smdit": 70_000,
    "diff2to3": 32_000_000,  # of which the weights of the embedded pipeline are nearly all
}
#: What the tests use besides the package.
TOOLS = ("pytest", "pytest-timeout", "hypothesis")
#: Extras of a package that its tests need.
EXTRAS = {"gs-render": ("cpu",)}
#: Files below `tests` that take long and say nothing new here.
LEFT_OUT = (
    "marope/test_triton.py",
    "gs_render/test_compilation_note.py",
    "gs_render/test_html.py",
    "flux_features/test_tiling.py",
    "flux_features/test_weights.py",
    "sparse_vae/test_triton_attention.py",
    "sparse_vae/test_triton_conv.py",
    "smdit/test_triton.py",
    "diff2to3/test_batch.py",
    "diff2to3/test_cli.py",
    "diff2to3/test_cli_files.py",
    "diff2to3/test_determinism.py",
    "diff2to3/test_doctor.py",
    "diff2to3/test_embedded.py",
    "diff2to3/test_mps.py",
    "diff2to3/test_properties.py",
    "diff2to3/test_trellis.py",
    "diff2to3/test_untrusted_pipeline.py",
)

IMPORT_ALL = """
import importlib, sys
package = importlib.import_module({package!r})
for name in getattr(package, "__all__", dir(package)):
    getattr(package, name)
for absent in {absent!r}:
    assert importlib.util.find_spec(absent) is None, f"{{absent}} can be imported, but {package} does not require it"
import torch
torch.set_num_threads(1)
"""
SMOKE = {
    "marope": """
from marope import MARoPE
rope = MARoPE(head_dim=12, grid_size=4)
q = torch.randn(1, 6, 2, 12)
assert rope(q, q, rope.plane(2, 3))[0].shape == q.shape
""",
    "gs-render": """
import tempfile
from gs_render import Camera, Gaussians, load, render, save
splat = Gaussians(means=torch.zeros(1, 3), scales=torch.full((1, 3), 0.2), quaternions=torch.tensor([[1.0, 0, 0, 0]]),
                  opacities=torch.ones(1), sh=torch.zeros(1, 1, 3))
assert render(splat, Camera.orbit(num_views=2, size=16)).alpha.max() > 0.5
with tempfile.TemporaryDirectory() as folder:
    for suffix in ("ply", "splat", "html"):
        save(splat, f"{folder}/a.{suffix}")
    assert len(load(f"{folder}/a.ply")) == 1
""",
    "flux-features": """
from flux_features import FluxFeatures, FluxFeaturesConfig
model = FluxFeatures(FluxFeaturesConfig(image_size=32))
features = model(torch.rand(1, 3, 32, 32))
assert model.tokens(features).shape == (1, 2, 2, 4 * model.channels)
""",
    "sparse-vae": """
from sparse_vae import SparseTensor, SparseVAE, SparseVAEConfig
model = SparseVAE(SparseVAEConfig(grid_size=8, width=32, num_blocks=1, num_heads=2, window_size=4))
coords = torch.tensor([[0, 0, 0], [1, 2, 3], [7, 7, 7]], dtype=torch.int32)
mean, _ = model.encoder(SparseTensor.from_coords([coords], [torch.randn(3, 16)], 8))
[gaussians] = model.decode(mean)
assert len(gaussians) == 3 * model.config.gaussians.num_gaussians
""",
    "smdit": """
from smdit import EulerSampler, SMDiT, SMDiTConfig, voxel_noise
from sparse_vae import SparseTensor
model = SMDiT(SMDiTConfig(grid_size=8, width=32, num_heads=2, head_dim=16, num_double_blocks=1, num_single_blocks=1))
coords = torch.tensor([[0, 0, 0], [1, 2, 3], [7, 7, 7]], dtype=torch.int32)
noise = SparseTensor.from_coords([coords], [voxel_noise(coords, 8, 8, seed=0)], 8)
assert EulerSampler(steps=2).sample(model, noise, torch.randn(1, 1, 2, 2, 64)).features.shape == (3, 8)
""",
    "diff2to3": """
import subprocess, json, pathlib
from diff2to3._locate import EMBEDDED, embedded_names
run = lambda *arguments: subprocess.run([sys.executable, "-m", "diff2to3", *arguments], capture_output=True, text=True)
rows = json.loads(run("plugins", "--json").stdout)
assert {row["role"] for row in rows if row["available"]} >= {"matting", "feature_extractor", "structure", "backbone",
    "latent_decoder", "renderer", "exporter"}, rows
assert not [row for row in rows if row["role"] is None], rows
assert run("--help").returncode == 0
embedded = [p.name for p in pathlib.Path(SOURCE, "diff2to3", "_weights").glob("*") if (p / "pipeline.json").is_file()]
assert sorted(embedded) == embedded_names(), "the wheel does not hold the pipelines of the source tree"
refused = run("app")
assert (refused.returncode, "pip install 'diff2to3[app]'" in refused.stderr) == (2, True), refused.stderr
app = pathlib.Path(importlib.import_module("diff2to3.app").__file__).parent
assert (app / "_style.css").is_file() and len(list((app / "_examples").glob("*.webp"))) == 6
for name in embedded:
    diff2to3 = importlib.import_module("diff2to3")
    diff2to3.Pipeline.from_pretrained(name, device="cpu")
""",
}


@pytest.fixture(scope="session")
def wheels(tmp_path_factory):
    """Distribution name -> its wheel, built from the sdist that lies beside it."""
    out = tmp_path_factory.mktemp("wheels")
    subprocess.run([uv(), "build", "--quiet", "--all-packages", "--out-dir", out], cwd=ROOT, check=True)
    found = {canonicalize_name(path.name.split("-")[0]): path for path in out.glob("*.whl")}
    assert sorted(found) == sorted(WORKSPACE)
    return found


@pytest.mark.parametrize("name", WORKSPACE)
def test_size_and_contents(name, wheels):
    wheel = wheels[name]
    [sdist] = wheel.parent.glob(f"{wheel.name.split('-')[0]}-*.tar.gz")
    for file in (wheel, sdist):
        assert file.stat().st_size <= BUDGET[name], f"{file.name} has grown: say why, and raise BUDGET"
    assert wheel.name.endswith("-py3-none-any.whl"), "expected pure Python, for every system"
    with zipfile.ZipFile(wheel) as archive:
        files = archive.namelist()
    package = WORKSPACE[name]
    tops = {file.split("/")[0] for file in files if ".dist-info/" not in file}
    assert {top for top in tops if not top.startswith(f"_{package}_")} == {package}, "foreign files at the top"
    assert f"{package}/py.typed" in files
    assert any(file.endswith(".dist-info/licenses/LICENSE") for file in files)
    assert not [file for file in files if file.endswith((".pyc", ".log"))]


def uv():
    program = os.environ.get("UV") or shutil.which("uv")
    return program or pytest.fail("uv is needed to build the wheels: pip install uv")


def closure(name, extras=frozenset(), seen=None):
    """Names of a distribution and of all that it requires, with the extras that are asked for."""
    seen = {} if seen is None else seen
    name = canonicalize_name(name)
    if extras <= seen.get(name, frozenset()) and name in seen:
        return seen
    seen[name] = seen.get(name, frozenset()) | extras
    try:
        requires = distribution(name).requires or []
    except PackageNotFoundError:  # not needed on this platform, or left out by the resolver
        del seen[name]
        return seen
    for line in requires:
        requirement = Requirement(line)
        environments = [{"extra": extra} for extra in ("", *seen.get(name, ()))]
        if requirement.marker is None or any(requirement.marker.evaluate(e) for e in environments):
            closure(requirement.name, frozenset(requirement.extras), seen)
    return seen


def link_distribution(name, site):
    """Make an installed distribution importable in another site-packages, by links to its top-level entries."""
    installed = distribution(name)
    for top in {file.parts[0] for file in installed.files or () if ".." not in file.parts}:
        source, target = Path(str(installed.locate_file(top))), site / top
        if source.exists() and not target.exists() and top != "__pycache__":
            target.symlink_to(source)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", WORKSPACE)
def test_wheel_alone(name, wheels, tmp_path):
    needed = set(closure(name))
    subprocess.run([uv(), "venv", "--quiet", "--python", sys.executable, tmp_path / "env"], check=True)
    python = tmp_path / "env" / ("Scripts" if os.name == "nt" else "bin") / "python"
    site = next((tmp_path / "env").glob("lib/python*/site-packages"), tmp_path / "env" / "Lib" / "site-packages")
    for requirement in sorted(needed - set(WORKSPACE)):
        link_distribution(requirement, site)
    own = [wheels[other] for other in sorted(needed & set(WORKSPACE))]
    install = [uv(), "pip", "install", "--quiet", "--offline", "--no-deps", "--link-mode", "copy", "--python", python]
    subprocess.run([*install, *own], check=True)

    def run(*arguments):
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "VIRTUAL_ENV"))}
        environment["OMP_NUM_THREADS"] = "1"
        result = subprocess.run(
            [python, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600
        )
        assert result.returncode == 0, (result.stdout + result.stderr)[-5000:]

    absent = [package for other, package in WORKSPACE.items() if other not in needed]
    source = ROOT / "packages" / WORKSPACE[name] / "src"
    run("-c", f"SOURCE = {str(source)!r}\n{IMPORT_ALL.format(package=WORKSPACE[name], absent=absent)}{SMOKE[name]}")
    tools = set(closure(name, frozenset(EXTRAS.get(name, ())))).union(*map(closure, TOOLS))
    for tool in sorted(tools - needed):
        link_distribution(tool, site)
    ignored = [f"--ignore={ROOT / 'tests' / file}" for file in LEFT_OUT]
    options = ["-p", "no:cacheprovider", "-c", ROOT / "pyproject.toml", "--rootdir", ROOT, *ignored]
    run("-m", "pytest", *options, ROOT / "tests" / WORKSPACE[name])


def test_arrows_between_the_packages():
    """The packages depend on each other as designed, and in no other way."""
    arrows = {
        name: {other for line in distribution(name).requires or () if (other := required(line)) in WORKSPACE}
        for name in WORKSPACE
    }
    assert arrows == {
        "marope": set(),
        "gs-render": set(),
        "flux-features": {"gs-render"},
        "sparse-vae": {"gs-render"},
        "smdit": {"marope", "sparse-vae"},
        "diff2to3": {"marope", "gs-render", "flux-features", "sparse-vae", "smdit"},
    }


def required(line):
    return canonicalize_name(Requirement(line).name)
