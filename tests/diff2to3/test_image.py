"""The condition image: where the object lands, what surrounds it, what is refused."""

import numpy as np
import pytest
from diff2to3 import condition_image, object_crop
from PIL import Image


def disc(height=200, width=300, centre=(120.0, 90.0), radius=40.0, colour=(200, 30, 60)):
    y, x = np.mgrid[:height, :width] + 0.5
    inside = (x - centre[0]) ** 2 + (y - centre[1]) ** 2 <= radius**2
    image = np.zeros((height, width, 4), np.uint8)
    image[..., :3] = (7, 250, 9)  # colour under zero alpha must never show
    image[inside] = (*colour, 255)
    return image


def test_object_fills_the_middle_of_a_white_square():
    out = condition_image(disc(), 120)
    assert out.shape == (120, 120, 3)
    assert out.dtype == np.float32
    np.testing.assert_allclose(out[60, 60], np.array([200, 30, 60]) / 255, atol=1e-5)
    np.testing.assert_allclose(out[:4, :4], 1.0, atol=1e-6)
    object_pixels = (out[..., 1] < 0.5).nonzero()
    for axis in object_pixels:  # box of 1 / 1.2 of the side, centred
        assert abs(axis.min() - 10) <= 1
        assert abs(axis.max() - 109) <= 1


def test_colour_under_zero_alpha_does_not_bleed():
    out = condition_image(disc(colour=(255, 0, 0)), 64)
    assert out[..., 0].min() > 0.98  # red object on white: red never drops, green background would pull it down


@pytest.mark.parametrize("scale", [1, 2, 4])
def test_independent_of_resolution_and_of_place(scale):
    small = condition_image(disc(), 96)
    large = disc(200 * scale, 300 * scale, (120.0 * scale, 90.0 * scale), 40.0 * scale)
    assert np.abs(condition_image(large, 96) - small).mean() < 0.01
    moved = np.roll(disc(), (15, -20), axis=(0, 1))
    np.testing.assert_allclose(condition_image(moved, 96), small, atol=1e-5)


def test_object_at_the_border_is_padded_with_white():
    out = condition_image(disc(centre=(10.0, 10.0)), 64)
    assert out[:3].min() == 1.0
    assert out[:, :3].min() == 1.0


def test_pil_uint8_and_float_agree():
    image = disc()
    expected = condition_image(image, 50)
    np.testing.assert_allclose(condition_image(Image.fromarray(image), 50), expected, atol=1e-6)
    np.testing.assert_allclose(condition_image(image.astype(np.float32) / 255, 50), expected, atol=1e-6)


def test_background_may_be_another_grey():
    crop, alpha = object_crop(disc(), 80)[..., :3], object_crop(disc(), 80)[..., 3:]
    for grey in (0.0, 0.25):
        out = condition_image(disc(), 80, background=grey)
        np.testing.assert_allclose(out, crop * alpha + grey * (1 - alpha), atol=2e-4)
    assert condition_image(disc(), 80, background=0.0)[:4, :4].max() == 0.0


def test_object_crop_composited_on_white_is_the_condition_image():
    crop = object_crop(disc(), 80)
    white = crop[..., :3] * crop[..., 3:] + 1 - crop[..., 3:]
    np.testing.assert_allclose(white, condition_image(disc(), 80), atol=2e-4)
    assert crop[0, 0].tolist() == [0, 0, 0, 0]


def test_input_is_not_changed():
    image = disc().astype(np.float32) / 255
    before = image.copy()
    condition_image(image, 32)
    np.testing.assert_array_equal(image, before)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.zeros((8, 8, 4), np.uint8), "no object"),
        (np.zeros((8, 8, 3), np.uint8), r"\[H, W, 4\]"),
        (np.zeros((0, 8, 4), np.uint8), r"\[H, W, 4\]"),
        (np.zeros((8, 8, 4), np.int64), "uint8"),
        (np.full((8, 8, 4), 3.0), "0, 1"),
        (np.full((8, 8, 4), np.nan), "0, 1"),
        (Image.new("RGB", (8, 8)), "alpha"),
    ],
)
def test_bad_input_says_what_is_expected(value, message):
    with pytest.raises(ValueError, match=message):
        condition_image(value, 16)


def test_bad_size():
    with pytest.raises(ValueError, match="size"):
        condition_image(disc(), 0)
