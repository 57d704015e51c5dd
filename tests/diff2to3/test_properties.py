"""Properties of the whole pipeline for random voxels and pictures: permuting, translating, batching, dtype."""

import functools

import numpy as np
import pytest
import torch
from diff2to3 import Pipeline
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

pytestmark = pytest.mark.usefixtures("one_thread")
few = functools.partial(settings, max_examples=6, suppress_health_check=[HealthCheck.function_scoped_fixture])
SEEDS = st.integers(0, 2**32 - 1)


@pytest.fixture(scope="module")
def pipeline(micro_pipeline):
    return Pipeline.from_pretrained(micro_pipeline, device="cpu")


def blob(rng, size=48):
    """A random picture with an alpha channel."""
    y, x = np.mgrid[:size, :size]
    low, high = rng.integers(4, 14, 2), rng.integers(30, 44, 2)
    inside = (y >= low[0]) & (y < high[0]) & (x >= low[1]) & (x < high[1])
    pixels = rng.integers(0, 256, (size, size, 4), dtype=np.uint8)
    pixels[..., 3] = 255 * inside
    return pixels


def voxels(rng, grid_size, count=30):
    flat = rng.choice(grid_size**3, size=rng.integers(3, count), replace=False)
    return torch.from_numpy(np.stack(np.unravel_index(flat, (grid_size,) * 3), axis=1)).int()


def of_voxels(latents):
    """Latents by voxel."""
    coords = latents.topology.coords[:, -3:]
    return {tuple(c.tolist()): row for c, row in zip(coords, latents.features, strict=True)}


@few()
@given(seed=SEEDS)
def test_the_order_of_the_voxels_does_not_matter(pipeline, seed):
    rng = np.random.default_rng(seed)
    coords = voxels(rng, pipeline.backbone.config.grid_size)
    shuffled = coords[torch.from_numpy(rng.permutation(len(coords)))]
    condition = pipeline.encode([[Image.fromarray(blob(rng))]])
    one, other = (of_voxels(pipeline.fill_voxels([c], condition, seed=seed)) for c in (coords, shuffled))
    assert one.keys() == other.keys() == {tuple(c.tolist()) for c in coords}
    for voxel, latent in one.items():
        torch.testing.assert_close(latent, other[voxel], atol=1e-4, rtol=1e-4)


@few()
@given(seed=SEEDS)
def test_moving_the_object_inside_its_picture_changes_nothing(pipeline, seed):
    """The condition is cut out by the alpha channel, so that not a bit of it may depend on where that is."""
    rng = np.random.default_rng(seed)
    pixels = blob(rng)
    top, left, bottom, right = rng.integers(0, 20, 4)
    moved = np.pad(pixels, ((top, bottom), (left, right), (0, 0)))
    one, other = (pipeline(Image.fromarray(p), seed=seed % 100, steps=1) for p in (pixels, moved))
    assert torch.equal(one.voxels, other.voxels)
    assert torch.equal(one.gaussians.means, other.gaussians.means)
    assert torch.equal(one.gaussians.sh, other.gaussians.sh)


@few()
@given(seed=SEEDS)
def test_gaussians_move_with_their_voxels(pipeline, seed):
    """Wherever the voxels are: each has its own Gaussians, and these stay within its reach."""
    rng = np.random.default_rng(seed)
    grid, config = pipeline.backbone.config.grid_size, pipeline.latent_decoder.config.gaussians
    shape = voxels(rng, grid // 2)
    condition = pipeline.encode([[Image.fromarray(blob(rng))]])
    for shift in (0, int(rng.integers(1, grid // 2))):
        latents = pipeline.fill_voxels([shape + shift], condition, seed=seed)
        [gaussians] = pipeline.decode(latents)
        assert len(gaussians) == len(shape) * config.num_gaussians
        centres = (latents.topology.coords[:, -3:].float() + 0.5) / grid - 0.5
        distance = (gaussians.means.view(len(shape), -1, 3) - centres[:, None]).abs().max()
        assert float(distance) <= 0.5 * config.offset_range / grid + 1e-5


@few(max_examples=3)
@given(seed=SEEDS)
def test_any_division_into_batches_gives_the_same(pipeline, seed):
    rng = np.random.default_rng(seed)
    pictures = [Image.fromarray(blob(rng)) for _ in range(4)]
    cut = int(rng.integers(1, 4))
    whole = pipeline.batch(pictures, seed=seed % 100, steps=1)
    first, second = (pipeline.batch(part, seed=seed % 100, steps=1) for part in (pictures[:cut], pictures[cut:]))
    for one, other in zip(whole, first + second, strict=True):
        assert torch.equal(one.voxels, other.voxels)
        torch.testing.assert_close(one.gaussians.means, other.gaussians.means, atol=1e-4, rtol=0)
        torch.testing.assert_close(one.gaussians.sh, other.gaussians.sh, atol=1e-3, rtol=1e-3)


@pytest.fixture(scope="module")
def half(micro_pipeline):
    return Pipeline.from_pretrained(micro_pipeline, device="cpu", dtype="bfloat16")


@few()
@given(seed=SEEDS)
def test_bfloat16_stays_close(pipeline, half, seed):
    """With the same voxels, for these are a threshold: the latents and the Gaussians."""
    rng = np.random.default_rng(seed)
    coords, cut = voxels(rng, pipeline.backbone.config.grid_size), [[Image.fromarray(blob(rng))]]
    results = []
    for pipe in (pipeline, half):
        latents = pipe.fill_voxels([coords], pipe.encode(cut), seed=seed)
        [gaussians] = pipe.decode(latents)
        results.append((latents.features.float(), gaussians.means))
    (latents, means), (rough, rough_means) = results
    assert (rough - latents).norm() <= 0.05 * latents.norm()
    assert (rough_means - means).abs().max() <= 0.02
