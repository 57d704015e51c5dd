"""Matting: cutting the object out of a picture without alpha. `border` for plain backgrounds, `rembg` for any."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageFilter
from pydantic import BaseModel, ConfigDict, Field

from diff2to3._errors import ImageInputError


class BorderMattingConfig(BaseModel):
    """Settings of `BorderMatting`; distances are of RGB in [0, 1], the largest channel difference.

    Args:
        tolerance: a pixel this close to the background's colour is background where it connects to the border.
        plainness: share of border pixels that must have the background's colour; below it the picture is refused.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    tolerance: float = Field(default=0.06, gt=0, lt=1)
    plainness: float = Field(default=0.6, ge=0, le=1)


class BorderMatting:
    """Removes a plain background: floods its colour in from the border and softens the edge.

    The background's colour is the median of the picture's outermost pixels. What is connected to the border and close
    to that colour becomes transparent; holes of that colour inside the object stay. At the edge alpha is estimated
    from the colour and the background's share is taken out of it, so that no fringe remains.
    """

    def __init__(self, config: BorderMattingConfig | None = None) -> None:
        self.config = config or BorderMattingConfig()

    def __call__(self, image: Image.Image) -> Image.Image:
        """RGB picture -> RGBA picture of the same size, straight alpha.

        Raises:
            ImageInputError: the border has no plain colour, or nothing differs from it.
        """
        rgb = np.asarray(image.convert("RGB"), dtype=np.float32) / 255.0
        border = np.concatenate([rgb[0], rgb[-1], rgb[:, 0], rgb[:, -1]])
        background = np.median(border, axis=0)
        plain = float((np.abs(border - background).max(axis=-1) <= self.config.tolerance).mean())
        if plain < self.config.plainness:
            raise ImageInputError(
                f"the background is not plain (only {plain:.0%} of the border has one colour); "
                "give a picture with alpha, or install 'diff2to3[matting]' and choose the matting 'rembg'"
            )
        distance = np.abs(rgb - background).max(axis=-1)
        outside = _connected_to_border(distance <= self.config.tolerance)
        if outside.all():
            raise ImageInputError("the picture shows no object: everything has the colour of its border")
        alpha = _soft_edge(outside, distance)
        # colour = alpha * object + (1 - alpha) * background, solved for the object
        mixed = np.maximum(alpha, 1e-3)[..., None]
        colour = np.clip((rgb - (1.0 - alpha[..., None]) * background) / mixed, 0.0, 1.0)
        rgba = np.concatenate([np.where(alpha[..., None] > 0, colour, 0.0), alpha[..., None]], axis=-1)
        return Image.fromarray(np.round(rgba * 255.0).astype(np.uint8))


def _connected_to_border(mask: np.ndarray) -> np.ndarray:
    """The part of a boolean mask [H, W] that is 4-connected to the picture's border."""
    reached = mask.copy()
    reached[1:-1, 1:-1] = False
    count = -1
    while count != (count := int(reached.sum())):  # a pass for every turn of the longest path: a handful
        for axis in (1, 0):
            reached = _fill_runs(mask, reached, axis)
    return reached


def _fill_runs(mask: np.ndarray, reached: np.ndarray, axis: int) -> np.ndarray:
    """Along one axis, every unbroken run of mask that holds a reached pixel becomes reached as a whole."""
    lines, hits = np.moveaxis(mask, axis, -1), np.moveaxis(reached, axis, -1)
    breaks = ~lines
    breaks[:, 0] = True  # a run ends with its line
    run = np.cumsum(breaks.ravel()) - 1
    filled = (np.bincount(run, weights=hits.ravel()) > 0)[run].reshape(lines.shape) & lines
    return np.moveaxis(filled, -1, axis)


def _soft_edge(outside: np.ndarray, distance: np.ndarray) -> np.ndarray:
    """Alpha [H, W]: 0 outside, 1 inside, in between on the two pixels next to the outside.

    There a pixel mixes object and background, so its distance from the background's colour is alpha times the object's:
    alpha is that distance over the largest one nearby.
    """

    def spread(values: np.ndarray, size: int) -> np.ndarray:
        return np.asarray(Image.fromarray(values).filter(ImageFilter.MaxFilter(size)))

    near = spread(outside.astype(np.uint8), 5) > 0
    object_distance = spread(np.round(distance * 255).astype(np.uint8), 7).astype(np.float32) / 255
    alpha = np.clip(distance / np.maximum(object_distance, 1 / 255), 0.0, 1.0)
    return np.where(outside, 0.0, np.where(near, alpha, 1.0)).astype(np.float32)


class RembgMattingConfig(BaseModel):
    """Settings of `RembgMatting`.

    Args:
        model: name of a rembg model; rembg downloads it on first use.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = "u2net"


class RembgMatting:
    """Removes any background with the networks of the rembg package (extra ``diff2to3[matting]``)."""

    def __init__(self, config: RembgMattingConfig | None = None) -> None:
        import rembg

        self.config = config or RembgMattingConfig()
        self._session = rembg.new_session(self.config.model)

    def __call__(self, image: Image.Image) -> Image.Image:
        """RGB picture -> RGBA picture of the same size, straight alpha."""
        import rembg

        return rembg.remove(image.convert("RGB"), session=self._session, post_process_mask=True).convert("RGBA")
