"""Border matting: what it removes, what it keeps, when it refuses."""

import numpy as np
import pytest
from diff2to3._errors import ImageInputError
from diff2to3._matting import BorderMatting, BorderMattingConfig
from PIL import Image, ImageDraw

BACKGROUND, OBJECT = (225, 230, 235), (170, 30, 60)


def picture(background=BACKGROUND, noise=0.0, antialias=4):
    """A disc with a hole of the background's colour, antialiased; and its exact coverage."""
    size = 200 * antialias
    mask = Image.new("L", (size, size))
    draw = ImageDraw.Draw(mask)
    draw.ellipse([size * 0.2, size * 0.25, size * 0.8, size * 0.85], fill=255)
    coverage = np.asarray(mask.resize((200, 200), Image.Resampling.BOX), np.float32) / 255
    image = coverage[..., None] * np.array(OBJECT) + (1 - coverage[..., None]) * np.array(background)
    image[95:105, 95:105] = background
    image += np.random.default_rng(0).normal(0, noise, image.shape)
    return Image.fromarray(image.clip(0, 255).round().astype(np.uint8)), coverage


@pytest.mark.parametrize("background", [BACKGROUND, (255, 255, 255), (0, 0, 0), (40, 90, 200)])
@pytest.mark.parametrize("noise", [0.0, 3.0])
def test_alpha_follows_the_object(background, noise):
    image, coverage = picture(background, noise)
    out = np.asarray(BorderMatting()(image), np.float32) / 255
    assert out.shape == (200, 200, 4)
    assert np.abs(out[..., 3] - coverage).mean() < 0.01
    assert out[..., 3][100, 100] == 1.0  # a hole of the background's colour inside the object stays
    edge = (out[..., 3] > 0.3) & (coverage < 0.99)
    assert np.abs(out[edge][:, :3] - np.array(OBJECT) / 255).mean() < 0.12  # no fringe of the background's colour


def test_winding_background_is_reached():
    image = Image.new("RGB", (101, 101), (250, 250, 250))
    draw = ImageDraw.Draw(image)
    for inset in range(5, 50, 10):  # rings with a gap, on alternating sides
        draw.rectangle([inset, inset, 100 - inset, 100 - inset], outline=(200, 0, 0), width=2)
        x = inset if (inset // 10) % 2 else 99 - inset
        draw.rectangle([x, 50, x + 2, 53], fill=(250, 250, 250))
    assert np.asarray(BorderMatting()(image))[50, 50, 3] == 0


def test_plain_picture_shows_no_object():
    with pytest.raises(ImageInputError, match="no object"):
        BorderMatting()(Image.new("RGB", (50, 50), (9, 9, 9)))


def test_busy_background_is_refused_with_advice():
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    with pytest.raises(ImageInputError, match="rembg"):
        BorderMatting()(Image.fromarray(noise))


def test_config_is_strict():
    with pytest.raises(ValueError, match="tolerance"):
        BorderMattingConfig(tolerance=2.0)
    with pytest.raises(ValueError, match="hardness"):
        BorderMattingConfig(hardness=1)
