"""Encoding in tiles gives the features of the whole picture, and no layer ever sees more than a tile at full size."""

import pytest
import torch
from flux_features import FluxFeatures, FluxFeaturesConfig


@pytest.fixture(scope="module")
def taef2(lively):
    return lively(FluxFeaturesConfig.preset("taef2"))


@pytest.fixture(scope="module")
def large():
    """Different everywhere, so that statistics of tiles differ from those of the picture; sides no multiples of 16."""
    picture = torch.rand(2, 3, 150, 203, generator=torch.Generator().manual_seed(4))
    return picture * torch.linspace(0, 1, 203) * torch.linspace(0.2, 1, 150)[:, None]


@pytest.mark.parametrize("name", ["tiny", "taef2", "kl", "kl2"])
@pytest.mark.parametrize("tile", [16, 64])
@torch.no_grad()
def test_tiled_equals_whole(name, tile, large, request):
    model = request.getfixturevalue(name)
    whole = model(large)
    tiled = model(large, tile=tile)
    assert tiled.shape == whole.shape
    torch.testing.assert_close(tiled, whole, atol=1e-4, rtol=1e-4)
    assert torch.equal(model(large), whole)  # nothing of it stays behind


@pytest.mark.parametrize("name", ["tiny", "kl"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_tiled_in_half_precision(name, dtype, large, request):
    """No farther from float32 than untiled half precision is, within a quarter."""
    large = large[:1, :, :48, :96]
    model = request.getfixturevalue(name)
    half = FluxFeatures(model.config).eval()
    half.load_state_dict(model.state_dict())
    half.to(dtype)
    exact, whole, tiled = model(large), half(large), half(large, tile=32)
    assert tiled.dtype == dtype
    assert (tiled.float() - exact).norm() < 1.25 * (whole.float() - exact).norm()


@pytest.mark.parametrize("name", ["tiny", "kl"])
@torch.no_grad()
def test_windows_stay_small(name, large, request):
    model = request.getfixturevalue(name)
    first = next(m for m in model.modules() if isinstance(m, torch.nn.Conv2d))
    seen = []
    handle = first.register_forward_hook(lambda module, inputs, output: seen.append(max(inputs[0].shape[-2:])))
    model(large, tile=64)
    handle.remove()
    assert max(seen) <= 64 + 2 * 8
    assert len(seen) >= 12


@torch.no_grad()
def test_a_picture_not_larger_than_the_tile_is_encoded_whole(kl, pictures):
    assert torch.equal(kl(pictures, tile=48), kl(pictures))


@pytest.mark.parametrize("tile", [0, -16, 40, 8])
def test_refuses_other_tiles(tiny, pictures, tile):
    with pytest.raises(ValueError, match=rf"tile = {tile}: expected a multiple of 16 px, or None"):
        tiny(pictures, tile=tile)
