"""All that the packages ask for, extras included, can be installed together: on every Python and system, from wheels.

Asks the package registry through uv, as a user's installation does. Where it cannot be reached these tests are
skipped and say so.
"""

import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import pytest
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PYTHONS = ("3.11", "3.12", "3.13", "3.14")
#: As uv calls them. The plain "linux" is an old one, for which PyTorch has no wheels any more.
PLATFORMS = {"linux": "x86_64-manylinux_2_28", "windows": "windows", "macos": "macos"}
#: Every Python on Linux; the first and the last elsewhere, where no marker of ours depends on it.
CASES = [
    (python, system)
    for python, system in product(PYTHONS, PLATFORMS)
    if system == "linux" or python in ("3.11", "3.14")
]
#: Distributions that need CUDA.
CUDA = re.compile(r"nvidia-|cuda-|triton|spconv|cumm|gsplat|xformers")
#: Those that extras of ours name, and the Pythons that have wheels of them.
EXTRAS = {
    "gsplat": PYTHONS,
    "xformers": PYTHONS,
    "spconv-triton": PYTHONS,
    "spconv-cu120": ("3.11",),
    "spconv-cu126": ("3.12", "3.13"),
}

pytestmark = [pytest.mark.long, pytest.mark.network, pytest.mark.timeout(600)]


def compile_for(python, platform, *arguments, text=None):
    """What uv chooses for an installation with nothing but wheels, as a finished process."""
    uv = os.environ.get("UV") or shutil.which("uv") or pytest.fail("uv is needed: pip install uv")
    command = [uv, "pip", "compile", *arguments, "--python-version", python, "--only-binary", ":all:"]
    command += ["--python-platform", platform, "--no-annotate", "--no-header", "--quiet", "--color", "never"]
    environment = {"UV_HTTP_TIMEOUT": "20"} | os.environ
    return subprocess.run(command, input=text, env=environment, capture_output=True, text=True, cwd=ROOT)


@pytest.fixture(scope="module")
def resolved():
    """(Python, system) -> uv's answer; asked for several at a time, because the registry is what takes long."""
    packages = sorted(ROOT.glob("packages/*/pyproject.toml"))
    probe = compile_for("3.12", PLATFORMS["linux"], "-", text="einops")
    if probe.returncode != 0:
        pytest.skip(f"NOT TESTED: no package registry can be reached ({' '.join(probe.stderr.split())[:200]})")
    with ThreadPoolExecutor(8) as pool:
        asked = {
            (python, system): pool.submit(compile_for, python, PLATFORMS[system], "--all-extras", *packages)
            for python, system in CASES
        }
    return {key: future.result() for key, future in asked.items()}


@pytest.mark.parametrize(("python", "system"), CASES)
def test_everything_resolves_to_wheels(resolved, python, system):
    """One installation with all packages and extras; whoever wants fewer finds at least those versions."""
    result = resolved[python, system]
    assert result.returncode == 0, result.stderr
    found = dict(line.split("==") for line in result.stdout.splitlines() if "==" in line)
    names = {canonicalize_name(name) for name in found}
    assert {"torch", "numba", "gradio", "rembg", "ray", "accelerate", "trimesh", "viser", "timm"} <= names
    if system != "linux":
        assert not [name for name in names if CUDA.match(name)], "CUDA extras are for Linux alone"
    else:
        missing = [name for name, pythons in EXTRAS.items() if (name in names) != (python in pythons)]
        assert not missing, f"not as expected on Python {python}: {missing}"
