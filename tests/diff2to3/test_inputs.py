"""Reading pictures of every kind, and refusing what is none."""

import io

import numpy as np
import pytest
import torch
from diff2to3 import read_image
from diff2to3._errors import ImageInputError
from diff2to3._inputs import MAX_PIXELS
from PIL import Image

RGB = np.random.default_rng(0).integers(0, 256, (12, 20, 3), dtype=np.uint8)
RGBA = np.concatenate([RGB, np.full((12, 20, 1), 128, np.uint8)], axis=-1)


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "CMYK", "1", "LA", "RGBA", "PA", "I;16"])
@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_every_mode_becomes_rgb_or_rgba(tmp_path, mode, suffix):
    if suffix == ".png" and mode in ("CMYK", "PA"):
        pytest.skip("PNG has no such mode")
    if mode == "I;16":
        image = Image.fromarray(RGB[..., 0].astype(np.uint16) * 257)
    else:
        image = Image.fromarray(RGB if mode == "P" else RGBA).convert(mode)
    path = tmp_path / f"a{suffix}"
    image.save(path)
    found = read_image(path)
    assert found.mode == ("RGBA" if mode in ("RGBA", "LA", "PA") else "RGB")
    assert found.size == (20, 12)
    if mode == "I;16":  # 16 bits are scaled, not clipped
        np.testing.assert_array_equal(np.asarray(found)[..., 0], RGB[..., 0])


def test_opaque_alpha_counts_as_none():
    opaque = RGBA.copy()
    opaque[..., 3] = 255
    assert read_image(opaque).mode == "RGB"


def test_exif_orientation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    Image.fromarray(RGB).save(tmp_path / "a.jpg", exif=exif)
    assert read_image(tmp_path / "a.jpg").size == (12, 20)


def test_arrays_and_tensors_agree():
    expected = np.asarray(read_image(RGB))
    np.testing.assert_array_equal(expected, RGB)
    tensor = torch.from_numpy(RGB).permute(2, 0, 1)
    for source in (RGB / 255.0, tensor, tensor / 255.0, Image.fromarray(RGB)):
        np.testing.assert_array_equal(np.asarray(read_image(source)), expected)
    assert read_image(RGB[..., 0]).mode == "RGB"
    assert read_image(RGBA).mode == "RGBA"


def png(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def bad_files():
    whole = png(Image.fromarray(RGB).resize((200, 200)))
    jpeg = io.BytesIO()
    Image.fromarray(RGB).resize((200, 200)).save(jpeg, "JPEG")
    return {
        "empty": (b"", "0 bytes"),
        "text": (b"this is not a picture", "not a picture"),
        "truncated": (whole[: len(whole) // 2], "truncated"),
        "truncated-jpeg": (jpeg.getvalue()[: len(jpeg.getvalue()) // 2], "truncated"),
        "damaged": (whole[:60] + bytes(40) + whole[100:], "damaged|not a picture"),
    }


@pytest.mark.parametrize("kind", bad_files())
def test_bad_files_are_refused(tmp_path, kind):
    data, message = bad_files()[kind]
    path = tmp_path / "bad.png"
    path.write_bytes(data)
    with pytest.raises(ImageInputError, match=message) as error:
        read_image(path)
    assert str(path) in str(error.value)


def test_bomb_is_refused_before_it_is_decoded(tmp_path):
    side = int(MAX_PIXELS**0.5) + 1
    path = tmp_path / "bomb.png"
    Image.new("1", (side, side)).save(path)
    assert path.stat().st_size < 1_000_000
    with pytest.raises(ImageInputError, match="at most"):
        read_image(path)
    Image.new("1", (20000, 20000)).save(path)  # over Pillow's own limit
    with pytest.raises(ImageInputError, match="at most"):
        read_image(path)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("/nowhere/a.png", "no such file"),
        (".", "folder"),
        (42, "got a int"),
        (np.zeros((4, 4, 2)), "shape"),
        (np.zeros((4, 0, 3)), "shape"),
        (np.full((4, 4, 3), 2.0), r"\[0, 1\]"),
        (np.full((4, 4, 3), np.nan), r"\[0, 1\]"),
        (np.zeros((4, 4, 3), np.int32), "int32"),
        (torch.zeros(5, 4, 3), "tensor"),
    ],
)
def test_bad_sources_say_what_is_expected(source, message):
    with pytest.raises(ImageInputError, match=message):
        read_image(source)
