"""Reading pictures: from a path, a PIL image, an array or a tensor to a PIL image, RGB or RGBA, 8 bit."""

from __future__ import annotations

import os
import struct
import warnings
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from diff2to3._errors import ImageInputError

if TYPE_CHECKING:
    from torch import Tensor

ImageSource: TypeAlias = "str | os.PathLike[str] | Image.Image | np.ndarray | Tensor"

#: Pictures with more pixels are refused before they are decoded: they cost gigabytes and add nothing.
MAX_PIXELS = 64_000_000
#: Formats that Pillow decodes itself. It would hand others, such as EPS, to a program of their own.
FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "AVIF", "TIFF", "GIF", "BMP", "TGA", "JPEG2000", "PPM", "ICO", "DDS", "PCX")
# by which Pillow's parsers report damaged data
_DAMAGE = (OSError, SyntaxError, ValueError, TypeError, EOFError, IndexError, KeyError, OverflowError, struct.error)


def read_image(source: ImageSource) -> Image.Image:
    """A picture as a PIL image of mode RGB, or RGBA when it has an alpha channel that is not opaque everywhere.

    Args:
        source: path of a file that Pillow reads (EXIF orientation is applied, of several frames the first is taken);
            a PIL image; an array [H, W], [H, W, 3] or [H, W, 4]; or a tensor [3, H, W] or [4, H, W]. Arrays and
            tensors are uint8 in 0..255 or float in [0, 1], straight alpha, sRGB.

    Raises:
        ImageInputError: missing, unreadable, truncated or empty file; too many pixels; wrong shape, type or range.
    """
    if isinstance(source, str | os.PathLike):
        image = _open(Path(source))
    elif isinstance(source, Image.Image):
        image = _decode(source, "the PIL image")
    else:
        image = _from_array(source)
    if image.mode == "RGBA" and image.getchannel("A").getextrema() == (255, 255):
        return image.convert("RGB")
    return image


def _open(path: Path) -> Image.Image:
    if not path.exists():
        raise ImageInputError(f"{path}: no such file; expected the path of a picture")
    if path.is_dir():
        raise ImageInputError(f"{path} is a folder; expected the path of a picture")
    try:
        if path.stat().st_size == 0:
            raise ImageInputError(f"{path} is empty (0 bytes); expected a picture")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit is checked below
            with Image.open(path, formats=_formats()) as image:
                return _decode(image, str(path))
    except ImageInputError:
        raise
    except UnidentifiedImageError as error:
        raise ImageInputError(
            f"{path} is not a picture that can be read; expected PNG, JPEG, WebP or similar"
        ) from error
    except Image.DecompressionBombError as error:
        raise ImageInputError(f"{path} is too large; expected at most {MAX_PIXELS:,} pixels") from error
    except PermissionError as error:
        raise ImageInputError(f"{path} cannot be read: permission denied") from error
    except _DAMAGE as error:  # in the header, or in a block of text or a colour profile that unpacks to too much
        raise ImageInputError(f"{path} is damaged or truncated: {' '.join(str(error).split())}") from error


@cache
def _formats() -> list[str]:
    """Those of `FORMATS` that this Pillow can read."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def _decode(image: Image.Image, label: str) -> Image.Image:
    """Decode one picture to RGB or RGBA, 8 bit."""
    if image.width * image.height > MAX_PIXELS:
        raise ImageInputError(
            f"{label} has {image.width} x {image.height} pixels; expected at most {MAX_PIXELS:,} in all"
        )
    if 0 in image.size:
        raise ImageInputError(f"{label} has {image.width} x {image.height} pixels; expected at least one")
    try:
        image.load()
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I") or image.mode == "F":  # 16 bits or more: Pillow's own conversion would clip
            return _grey_to_rgb(np.asarray(image), label)
        return image.convert("RGBA" if image.has_transparency_data else "RGB")
    except ImageInputError:
        raise
    except _DAMAGE as error:
        raise ImageInputError(f"{label} is damaged or truncated: {' '.join(str(error).split())}") from error


def _grey_to_rgb(values: np.ndarray, label: str) -> Image.Image:
    low, high = float(values.min()), float(values.max())
    if not (low >= 0 and high <= 65535):
        raise ImageInputError(f"{label} holds values from {low:.4g} to {high:.4g}; expected 0 to 65535 (16 bit)")
    scale = 257.0 if high > 255 else 1.0
    return Image.fromarray(np.round(values / scale).astype(np.uint8)).convert("RGB")


def _from_array(source: Any) -> Image.Image:
    is_tensor = type(source).__module__.partition(".")[0] == "torch"
    expected = "a tensor [3 or 4, H, W]" if is_tensor else "an array [H, W], [H, W, 3] or [H, W, 4]"
    if is_tensor:
        source = source.detach().cpu().float().numpy() if source.is_floating_point() else source.detach().cpu().numpy()
        if source.ndim != 3 or source.shape[0] not in (3, 4):
            raise ImageInputError(f"got a tensor of shape {list(source.shape)}; expected {expected}")
        source = np.moveaxis(source, 0, -1)
    if not isinstance(source, np.ndarray):
        raise ImageInputError(
            f"got a {type(source).__name__}; expected a path, a PIL image, {expected}, or a tensor [3 or 4, H, W]"
        )
    if source.ndim not in (2, 3) or (source.ndim == 3 and source.shape[-1] not in (3, 4)) or 0 in source.shape:
        raise ImageInputError(f"got an array of shape {list(source.shape)}; expected {expected}")
    if source.dtype != np.uint8:
        if not np.issubdtype(source.dtype, np.floating):
            raise ImageInputError(f"got values of type {source.dtype}; expected uint8 in 0..255 or float in [0, 1]")
        low, high = float(source.min()), float(source.max())
        if not (low >= -1e-3 and high <= 1 + 1e-3):  # false for NaN as well
            raise ImageInputError(f"got float values from {low:.4g} to {high:.4g}; expected [0, 1]")
        source = np.round(np.clip(source, 0, 1) * 255).astype(np.uint8)
    image = Image.fromarray(np.ascontiguousarray(source))
    return image if image.mode == "RGBA" else image.convert("RGB")
