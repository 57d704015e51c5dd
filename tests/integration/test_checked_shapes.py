"""The whole pipeline with every jaxtyping annotation checked: shapes and types are what the signatures say."""

import subprocess
import sys
from pathlib import Path

CODE = """
from jaxtyping import TypeCheckError, install_import_hook
install_import_hook(["marope", "gs_render", "sparse_vae", "smdit", "flux_features"], "shape_checker.check")
import sys, torch
from PIL import Image, ImageDraw
from gs_render import Camera
from smdit import voxel_noise
from diff2to3 import Pipeline

torch.set_num_threads(1)
try:
    voxel_noise(torch.zeros(5, 4), channels=8, grid_size=8, seed=0)
except TypeCheckError:
    pass
else:
    sys.exit("annotations are not checked")
image = Image.new("RGBA", (64, 64))
ImageDraw.Draw(image).ellipse((8, 8, 50, 56), fill=(200, 30, 40, 255))
# gs_render's compiled kernels cannot be built from checked functions, so the plain renderer draws
pipe = Pipeline.from_pretrained(sys.argv[1], device="cpu", renderer="torch")
for asset in pipe.batch([[image, image], [image, image]], steps=2):
    assert asset.render(Camera.orbit(num_views=2, size=16)).color.shape == (2, 16, 16, 3)
"""


def test_annotations_hold(micro_pipeline):
    command = [sys.executable, "-c", CODE, str(micro_pipeline)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=280, cwd=Path(__file__).parent)
    assert result.returncode == 0, result.stderr[-3000:]
