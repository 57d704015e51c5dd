"""The pipeline in the wheel, with its trained weights: the picture decides what comes out."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diff2to3 import Pipeline
from gs_render import Camera, render
from PIL import Image

EXAMPLES = Path(__file__).parents[2] / "examples"
NAMES = ("cake", "mushroom", "robot")


@pytest.fixture(scope="module")
def pipeline():
    return Pipeline.from_pretrained(device="cpu")


@pytest.fixture(scope="module")
def assets(pipeline):
    return dict(zip(NAMES, pipeline.batch([EXAMPLES / f"{n}.png" for n in NAMES], steps=8, seed=0), strict=True))


def _picture_color(name):
    """Mean colour of the object in the picture."""
    rgba = np.asarray(Image.open(EXAMPLES / f"{name}.png").convert("RGBA"), np.float32) / 255
    inside = rgba[..., 3] > 0.5
    if inside.all():  # a plain background
        inside = np.abs(rgba[..., :3] - rgba[0, 0, :3]).max(-1) > 0.1
    return rgba[inside, :3].mean(0)


def _asset_color(asset):
    drawn = render(asset.gaussians, Camera.orbit(num_views=4, size=64), 0.0)
    return (drawn.color.sum((0, 1, 2)) / drawn.alpha.sum()).numpy()


def test_every_asset_has_the_colour_of_its_own_picture(assets):
    wanted = np.stack([_picture_color(name) for name in NAMES])
    found = np.stack([_asset_color(assets[name]) for name in NAMES])
    gaps = np.abs(found[:, None] - wanted[None]).mean(-1)
    assert np.diag(gaps).max() < 0.15
    assert (gaps.argmin(1) == np.arange(len(NAMES))).all()


def test_assets_are_surfaces_not_dust_or_blocks(assets):
    for name, asset in assets.items():
        assert 200 < len(asset.voxels) < 12_000, name
        assert torch.isfinite(asset.gaussians.means).all()
        extent = asset.voxels.amax(0) - asset.voxels.amin(0) + 1
        assert extent.max() >= 24, f"{name} does not fill its grid: {extent.tolist()}"


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(pipeline, tmp_path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        pipeline(EXAMPLES / "chair.png", seed=seed, steps=2).save(tmp_path / f"{name}.ply")
    first, again, other = ((tmp_path / f"{name}.ply").read_bytes() for name in "abc")
    assert first == again != other
