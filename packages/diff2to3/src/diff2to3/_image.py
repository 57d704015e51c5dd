"""The condition image: how a picture with alpha becomes the square image that the models see.

Training and inference call the same function, so an object has the same size and place in both.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Float
from PIL import Image

#: Side of the square crop in units of the longer side of the object's alpha box.
CROP_MARGIN = 1.2
#: A pixel belongs to the object's box when its alpha is at least this.
ALPHA_THRESHOLD = 0.5

RGBA = Image.Image | np.ndarray


def condition_image(rgba: RGBA, size: int, background: float = 1.0) -> Float[np.ndarray, "{size} {size} 3"]:
    """Crop an object squarely, composite it on white and resize it: the image that the models see.

    The crop is a square of `CROP_MARGIN` x the longer side of the box of pixels with alpha >= `ALPHA_THRESHOLD`,
    centred on that box; what lies outside the picture is background. Resizing is antialiased (bicubic) and done on
    premultiplied colour.

    Args:
        rgba: picture with straight alpha, sRGB: a PIL image, or an array [H, W, 4], uint8 in 0..255 or float in [0, 1].
        size: side of the result in pixels.
        background: grey behind the object, 1 is white. Models trained elsewhere may want another: TRELLIS's see black.

    Returns:
        float32 array [size, size, 3], RGB in [0, 1], sRGB as displayed.

    Raises:
        ValueError: no alpha channel, wrong shape or type, values outside [0, 1] or not finite, or no object pixel.
    """
    planes = _square_crop(rgba, size)
    composite = planes[:3] + np.float32(background) * (1.0 - planes[3])
    return np.ascontiguousarray(np.clip(composite, 0.0, 1.0).transpose(1, 2, 0))


def object_crop(rgba: RGBA, size: int) -> Float[np.ndarray, "{size} {size} 4"]:
    """The same crop as `condition_image` with its alpha kept: float32 [size, size, 4], straight alpha, in [0, 1].

    Colour is zero where alpha is zero. Compositing the result on white gives `condition_image`.
    """
    planes = _square_crop(rgba, size)
    visible = planes[3] > 1e-4
    planes[:3] *= visible / np.where(visible, planes[3], np.float32(1))
    return np.ascontiguousarray(np.clip(planes, 0.0, 1.0).transpose(1, 2, 0))


def alpha_box(alpha: Float[np.ndarray, "h w"]) -> tuple[int, int, int, int]:
    """Box (left, top, right, bottom) of the pixels with alpha >= `ALPHA_THRESHOLD`; right and bottom are exclusive."""
    inside = alpha >= ALPHA_THRESHOLD
    columns, rows = np.flatnonzero(inside.any(axis=0)), np.flatnonzero(inside.any(axis=1))
    if not len(columns):
        raise ValueError(
            f"the picture shows no object: alpha is at most {float(alpha.max(initial=0.0)):.2f}, "
            f"expected pixels with alpha >= {ALPHA_THRESHOLD}"
        )
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def as_rgba_array(rgba: RGBA) -> Float[np.ndarray, "h w 4"]:
    """float32 [H, W, 4] in [0, 1] of a PIL image with alpha or of an array [H, W, 4] (uint8, or float in [0, 1])."""
    return _as_float(_as_array(rgba))


def _as_array(rgba: RGBA) -> np.ndarray:
    """The pixels [H, W, 4] as they are: uint8, or float32 in [0, 1]."""
    if isinstance(rgba, Image.Image):
        if not rgba.has_transparency_data:
            raise ValueError(
                f"expected a picture with alpha, got mode {rgba.mode!r}; remove its background first (matting)"
            )
        rgba = np.asarray(rgba.convert("RGBA"))
    array: Any = np.asarray(rgba)
    if array.ndim != 3 or array.shape[-1] != 4 or 0 in array.shape:
        raise ValueError(f"expected an array [H, W, 4] (RGB and alpha), got shape {list(array.shape)}")
    if array.dtype == np.uint8:
        return array
    if not np.issubdtype(array.dtype, np.floating):
        raise ValueError(f"expected uint8 in 0..255 or float in [0, 1], got {array.dtype}")
    array = array.astype(np.float32)
    low, high = float(array.min()), float(array.max())
    if not (low >= -1e-4 and high <= 1.0 + 1e-4):  # false for NaN as well
        raise ValueError(f"expected float values in [0, 1], got {low:.4g} to {high:.4g}")
    return np.clip(array, 0.0, 1.0)


def _as_float(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float32) / np.float32(255) if array.dtype == np.uint8 else array


def _square_crop(rgba: RGBA, size: int) -> np.ndarray:
    """Planes [4, size, size] of the square crop around the object: colour premultiplied with alpha, and alpha."""
    if size < 1:
        raise ValueError(f"size must be at least 1 pixel, got {size}")
    array = _as_array(rgba)
    left, top, right, bottom = alpha_box(_as_float(array[..., 3]))
    side = CROP_MARGIN * max(right - left, bottom - top)
    x0, y0 = (left + right - side) / 2, (top + bottom - side) / 2
    # Pillow resamples a fractional box exactly, but only inside the image: cut whole pixels around it, zero beyond.
    column, row = int(np.floor(x0)), int(np.floor(y0))
    window = _cut(array, column, row, int(np.ceil(x0 + side)) - column, int(np.ceil(y0 + side)) - row)
    planes = _as_float(np.ascontiguousarray(window.transpose(2, 0, 1)))
    planes[:3] *= planes[3]
    box = (x0 - column, y0 - row, x0 - column + side, y0 - row + side)
    resized = np.empty((4, size, size), np.float32)
    for channel, plane in enumerate(planes):
        image = Image.fromarray(plane)
        resized[channel] = np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, box=box, reducing_gap=4.0))
    alpha = np.clip(resized[3], 0.0, 1.0)
    return np.concatenate([np.clip(resized[:3], 0.0, alpha), alpha[None]])


def _cut(array: np.ndarray, column: int, row: int, width: int, height: int) -> np.ndarray:
    """Copy of array[row:row+height, column:column+width], zero where that leaves the array."""
    window = np.zeros((height, width, array.shape[-1]), dtype=array.dtype)
    top, left = max(row, 0), max(column, 0)
    bottom, right = min(row + height, array.shape[0]), min(column + width, array.shape[1])
    window[top - row : bottom - row, left - column : right - column] = array[top:bottom, left:right]
    return window
