"""Draw the example pictures: procedural objects (CC0-1.0), RGBA, 512 x 512; `diff2to3 app` gets small copies of them.

python examples/make_examples.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
from diff2to3 import object_crop
from diff2to3.data._mesh import load_mesh
from diff2to3.data._renderers import open_renderer
from diff2to3.data._synthesize import make_object
from diff2to3.data._views import orbit
from PIL import Image

SIZE = 512
APP = Path(__file__).resolve().parents[1] / "packages" / "diff2to3" / "src" / "diff2to3" / "app" / "_examples"
# name: (seed, number of the object in that seed, azimuth and elevation of the camera in degrees)
OBJECTS = {
    "chair": (0, 0, -32, 22),
    "house": (0, 2, -34, 24),
    "mushroom": (0, 4, -20, 14),
    "robot": (0, 5, -28, 14),
    "cake": (0, 26, -20, 26),
    "sailboat": (0, 28, -24, 16),
}


def main() -> None:
    """Writes every picture beside this file."""
    renderer = open_renderer()
    for name, (seed, number, azimuth, elevation) in OBJECTS.items():
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"{name}.glb"
            make_object(name, seed, number).export(path)
            mesh = load_mesh(path)
        views = orbit(np.array([azimuth]), np.array([elevation]), np.array([3.0]), np.array([30.0]), 3 * SIZE)
        frames, _ = renderer(mesh, views.world_to_camera, views.intrinsics, views.size)
        picture = np.rint(object_crop(frames[0], SIZE) * 255).astype(np.uint8)
        image = Image.fromarray(picture)
        image.save(Path(__file__).with_name(f"{name}.png"), optimize=True)
        save_small(image, name)


def save_small(image: Image.Image, name: str) -> None:
    """The copy in the package: half the size, some 10 kB."""
    image.resize((SIZE // 2, SIZE // 2), Image.Resampling.LANCZOS).save(APP / f"{name}.webp", quality=90)


if __name__ == "__main__":
    main()
