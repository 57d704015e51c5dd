"""A file system that can be full or closed, and pictures."""

import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image, ImageDraw


@pytest.fixture
def small_disk(tmp_path):
    """small_disk(size, *options): makes a file system of its own of that size, or changes it."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = []

    def mount(size, *options):
        if not sys.platform.startswith("linux"):
            pytest.skip("NO SMALL DISK: not Linux")
        settings = ",".join([f"size={size}", *(["remount"] if mounted else []), *options])
        result = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", settings, "tmpfs", folder], capture_output=True, text=True
        )
        if result.returncode:
            pytest.skip(f"NO SMALL DISK: it takes root to mount one ({result.stderr.strip()})")
        mounted.append(folder)
        return folder

    yield mount
    if mounted:
        subprocess.run(["umount", folder], check=True)


@pytest.fixture(scope="session")
def four_pictures(tmp_path_factory):
    """Folder of four pictures of different discs."""
    folder = Path(tmp_path_factory.mktemp("four"))
    for number in range(4):
        image = Image.new("RGBA", (64, 64))
        ImageDraw.Draw(image).ellipse((10, 10, 30 + 7 * number, 50), fill=(200, 60 * number, 40, 255))
        image.save(folder / f"p{number}.png")
    return folder
