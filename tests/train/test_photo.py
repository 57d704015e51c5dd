"""Rendered condition pictures made to look photographed."""

import io

import numpy as np
import pytest
import torch
from diff2to3.train._photo import PhotoAugmentation, blurred, jpeg, moved_edge, photograph
from PIL import Image
from pydantic import ValidationError

SIDE = 64
NOTHING = PhotoAugmentation(
    exposure=0, temperature=0, contrast=0, saturation=0, shade=0, blur=0, noise=0, jpeg=100, bleed=0
)


def scene(count=1, side=SIDE):
    """A disc with coloured waves, premultiplied RGBA."""
    y, x = torch.meshgrid(*[torch.linspace(-1, 1, side)] * 2, indexing="ij")
    colour = torch.stack([torch.sin(9 * x + 4 * k) * torch.cos(7 * y - k) * 0.4 + 0.5 for k in range(3)])
    alpha = ((x**2 + y**2).sqrt() < 0.7).float()[None]
    return torch.cat([colour * alpha, alpha])[None].repeat(count, 1, 1, 1)


@pytest.mark.parametrize("quality", [10, 30, 50, 75, 95])
def test_jpeg_is_that_of_libjpeg(quality):
    picture = scene(side=96)[:, :3]
    array = (picture[0] * 255).round().byte().permute(1, 2, 0).numpy()
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "jpeg", quality=quality, subsampling=2)
    theirs = torch.from_numpy(np.asarray(Image.open(buffer)).copy()).permute(2, 0, 1)[None] / 255
    ours = jpeg(torch.from_numpy(array).permute(2, 0, 1)[None] / 255, torch.tensor([float(quality)]))
    loss = (theirs - picture).square().mean()
    # libjpeg rounds to 8 bits before and after; beside what the quality costs that is little
    assert (ours - theirs).square().mean() < 0.1 * loss
    assert (ours - picture).square().mean() == pytest.approx(loss.item(), rel=0.15)


def test_jpeg_of_any_size_and_of_quality_100():
    picture = scene(2, 51)[:, :3]
    out = jpeg(picture, torch.tensor([100.0, 20.0]))
    assert torch.equal(out[0], picture[0])
    assert out.shape == picture.shape
    assert not torch.equal(out[1], picture[1])


def test_blur_is_a_gaussian_for_each_picture():
    point = torch.zeros(2, 1, 41, 41)
    point[:, :, 20, 20] = 1
    out = blurred(point, torch.tensor([0.0, 3.0]), 3.0)
    torch.testing.assert_close(out[0], point[0])
    assert out[1].sum() == pytest.approx(1, abs=1e-3)
    steps = torch.arange(41) - 20.0
    assert (out[1, 0].sum(0) * steps**2).sum().sqrt() == pytest.approx(3, rel=0.03)


@pytest.mark.parametrize("pixels", [-3.0, 2.0, 5.0])
def test_an_edge_moves_by_so_many_pixels(pixels):
    alpha = (torch.arange(80) < 40).float().expand(1, 1, 80, 80)
    moved = moved_edge(alpha, torch.tensor([pixels]), abs(pixels))
    assert moved[0, 0, 40].sum().item() == pytest.approx(40 + pixels, abs=0.5)


def test_nothing_changes_without_amounts():
    picture = scene(3)
    torch.testing.assert_close(photograph(picture, NOTHING, torch.Generator().manual_seed(0)), picture)


def test_pictures_stay_pictures_and_repeat_with_the_seed():
    picture = scene(32)
    one, two, other = (
        photograph(picture, PhotoAugmentation(), torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(one, two)
    assert not torch.equal(one, other)
    assert one.isfinite().all()
    assert one.amin() >= 0
    assert one.amax() <= 1
    assert (one[:, :3] <= one[:, 3:] + 1e-6).all(), "colour beyond alpha is not premultiplied"
    changed = (one - picture).abs().amax((1, 2, 3)) > 0.02
    assert changed.float().mean() > 0.8


def test_the_background_shows_only_where_the_matte_is_off():
    settings = NOTHING.model_copy(update={"bleed": 0.05})
    out = photograph(scene(16), settings, torch.Generator().manual_seed(0))
    inside = scene()[0, 3] > 0
    core = torch.nn.functional.max_pool2d(1 - inside.float()[None], 9, 1, 4)[0] == 0
    torch.testing.assert_close(out[:, :3][..., core], scene(16)[:, :3][..., core], atol=1e-5, rtol=0)
    wider = out[:, 3].sum((1, 2)) / inside.sum()
    assert wider.max() > 1.02
    assert (wider - 1).abs().min() < 1e-6


def test_amounts_out_of_range_are_refused():
    with pytest.raises(ValidationError, match="jpeg"):
        PhotoAugmentation(jpeg=0)
