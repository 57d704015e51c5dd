"""The six wheels are the same bytes wherever, whenever and by whomever they are built."""

import os
import shutil
import subprocess
from hashlib import sha256
from pathlib import Path

import pytest

pytestmark = pytest.mark.long
ROOT = Path(__file__).resolve().parents[1]
NAMES = sorted(path.name for path in (ROOT / "packages").iterdir() if (path / "pyproject.toml").is_file())


def build(name, folder, umask, year):
    """SHA-256 of the wheel of a package, built from a copy whose files have other times, modes and places."""
    source = folder / name
    ignored = shutil.ignore_patterns("__pycache__", "*.pyc")
    shutil.copytree(ROOT / "packages" / name, source, ignore=ignored)
    seconds = (year - 1970) * 365 * 86_400
    for path in sorted(source.rglob("*"), reverse=year % 2 == 0):
        path.chmod(0o777 & ~umask if path.is_dir() else 0o666 & ~umask)
        os.utime(path, (seconds, seconds))
    uv = os.environ.get("UV") or shutil.which("uv") or pytest.fail("uv is needed to build the wheels: pip install uv")
    environment = {key: value for key, value in os.environ.items() if key != "SOURCE_DATE_EPOCH"}
    environment |= {"TZ": "Asia/Tokyo" if year % 2 else "UTC", "LC_ALL": "C"}
    command = [uv, "build", "--quiet", "--wheel", "--no-sources", "--out-dir", folder / "out", source]
    subprocess.run(command, check=True, env=environment, umask=umask)
    [wheel] = (folder / "out").glob("*.whl")
    return sha256(wheel.read_bytes()).hexdigest()


@pytest.mark.parametrize("name", NAMES)
def test_a_wheel_is_the_same_bytes_again(name, tmp_path):
    here, there = tmp_path / "a", tmp_path / "elsewhere" / "deeper"
    here.mkdir()
    there.mkdir(parents=True)
    assert build(name, here, umask=0o022, year=2001) == build(name, there, umask=0o077, year=2020)


def test_all_six_packages_are_built():
    assert NAMES == ["diff2to3", "flux_features", "gs_render", "marope", "smdit", "sparse_vae"]
