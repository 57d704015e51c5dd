"""Makes rendered condition pictures look like photographs that somebody cut out: light, lens, JPEG and matte."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

_LUMA = (
    (16, 11, 10, 16, 24, 40, 51, 61),
    (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77),
    (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101),
    (72, 92, 95, 98, 112, 100, 103, 99),
)
_CHROMA = (
    (17, 18, 24, 47, 99, 99, 99, 99),
    (18, 21, 26, 66, 99, 99, 99, 99),
    (24, 26, 56, 99, 99, 99, 99, 99),
    (47, 66, 99, 99, 99, 99, 99, 99),
    *[(99,) * 8] * 4,
)
"""Quantisation tables of quality 50 (ITU-T T.81, annex K.1)."""
_YCC = ((0.299, 0.587, 0.114), (-0.168736, -0.331264, 0.5), (0.5, -0.418688, -0.081312))


class PhotoAugmentation(BaseModel):
    """The most that is done to a picture; every change comes to half of the pictures, with a random amount.

    Args:
        exposure: factor of all colour, in stops up or down.
        temperature: factor of red, its inverse of blue, as a natural logarithm.
        contrast: factor of the distance to middle grey, less one.
        saturation: factor of the distance to grey, less one.
        shade: light that falls off over the picture, as a share.
        blur: standard deviation of a Gaussian, as a share of the picture's side.
        noise: standard deviation, of values in [0, 1].
        jpeg: lowest quality; 100 leaves pictures as they are.
        bleed: how far the matte's edge is off, as a share of the side; the background's colour shows there.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    exposure: float = Field(default=0.5, ge=0, le=4)
    temperature: float = Field(default=0.12, ge=0, le=1)
    contrast: float = Field(default=0.25, ge=0, lt=1)
    saturation: float = Field(default=0.3, ge=0, le=1)
    shade: float = Field(default=0.35, ge=0, lt=1)
    blur: float = Field(default=0.006, ge=0, le=0.1)
    noise: float = Field(default=0.02, ge=0, le=0.5)
    jpeg: int = Field(default=30, ge=1, le=100)
    bleed: float = Field(default=0.008, ge=0, le=0.1)


def photograph(
    images: Float[Tensor, "B 4 H W"], settings: PhotoAugmentation, generator: torch.Generator
) -> Float[Tensor, "B 4 H W"]:
    """Pictures of one object each, changed as `settings` say.

    Args:
        images: premultiplied RGBA in [0, 1].
        settings: the most that is done.
        generator: on the device of the pictures.

    Returns:
        Premultiplied RGBA in [0, 1].
    """
    count, side = len(images), images.shape[-1]

    def amount(low: float, high: float) -> Float[Tensor, " B"]:
        """Uniform, and zero for half of the pictures."""
        draw, coin = torch.rand(2, count, generator=generator, device=images.device)
        return torch.where(coin < 0.5, low + (high - low) * draw, 0.0)

    alpha = images[:, 3:]
    colour = images[:, :3] / alpha.clamp(min=1e-4)
    colour = colour * _wide(torch.exp2(amount(-settings.exposure, settings.exposure)))
    warmth = amount(-settings.temperature, settings.temperature)
    colour = colour * torch.stack([warmth.exp(), torch.ones_like(warmth), (-warmth).exp()], 1)[..., None, None]
    grey = colour.mean(1, keepdim=True)
    colour = grey + (colour - grey) * _wide(1 + amount(-settings.saturation, settings.saturation))
    colour = 0.5 + (colour - 0.5) * _wide(1 + amount(-settings.contrast, settings.contrast))
    colour = colour * _falling_light(amount(0, settings.shade), amount(-math.pi, math.pi), side)
    ground = torch.rand(count, 3, 1, 1, generator=generator, device=images.device)
    photo = colour.clamp(0, 1) * alpha + ground * (1 - alpha)
    widest = settings.blur * side
    photo, alpha = blurred(torch.cat([photo, alpha], 1), amount(0, widest), widest).split([3, 1], 1)
    grain = torch.randn(photo.shape, generator=generator, device=images.device)
    photo = photo + grain * _wide(amount(0, settings.noise))
    photo = jpeg(photo.clamp(0, 1), 100 - amount(0, 100 - settings.jpeg))
    farthest = settings.bleed * side
    matte = moved_edge(alpha, amount(-farthest / 2, farthest), farthest)
    return torch.cat([photo * matte, matte], 1)


def blurred(images: Float[Tensor, "B C H W"], sigma: Float[Tensor, " B"], widest: float) -> Float[Tensor, "B C H W"]:
    """Gaussian blur by a standard deviation in pixels for each picture, at most `widest`; 0 leaves it as it is."""
    radius = max(1, math.ceil(3 * widest))  # of the values themselves the host knows nothing
    steps = torch.arange(-radius, radius + 1, device=images.device)
    kernel = torch.exp(-0.5 * (steps / sigma.clamp(min=1e-3)[:, None]) ** 2)
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(images.shape[1], 0)
    rows = F.pad(images.flatten(0, 1)[None], (radius,) * 4, mode="replicate")
    rows = F.conv2d(rows, kernel[:, None, None, :], groups=len(kernel))
    return F.conv2d(rows, kernel[:, None, :, None], groups=len(kernel)).view_as(images)


def moved_edge(
    alpha: Float[Tensor, "B 1 H W"], pixels: Float[Tensor, " B"], farthest: float
) -> Float[Tensor, "B 1 H W"]:
    """Alpha whose edge lies so many pixels further out (or in, if negative), and is as soft as it was moved far."""
    width = pixels.abs()
    soft = blurred(alpha, width, farthest)
    # A straight edge blurred by sigma is the normal distribution of the distance: one sigma outside it is 0.159. Four
    # times as steep it reaches 0 and 1 within two sigma.
    level = 0.5 - 0.341 * pixels.sign()
    moved = (soft - _wide(level)) * 4 + 0.5
    return torch.where(_wide(width) > 0.05, moved, alpha).clamp(0, 1)


def jpeg(images: Float[Tensor, "B 3 H W"], quality: Float[Tensor, " B"]) -> Float[Tensor, "B 3 H W"]:
    """What JPEG of a quality (1 to 100, as libjpeg counts) makes of pictures, chroma at half resolution.

    Pictures of quality 100 come back as they are.
    """
    height, width = images.shape[-2:]
    padded = F.pad(images, (0, -width % 16, 0, -height % 16), mode="replicate")
    matrix = images.new_tensor(_YCC)
    planes = torch.einsum("ij,bjhw->bihw", matrix, padded) * 255
    luma = _quantised(planes[:, :1] - 128, images.new_tensor(_LUMA), quality) + 128
    chroma = _quantised(F.avg_pool2d(planes[:, 1:], 2), images.new_tensor(_CHROMA), quality)
    chroma = F.interpolate(chroma, scale_factor=2, mode="bilinear", align_corners=False)
    result = torch.einsum("ij,bjhw->bihw", matrix.inverse(), torch.cat([luma, chroma], 1)) / 255
    return torch.where(_wide(quality) < 100, result[..., :height, :width].clamp(0, 1), images)


def _quantised(
    planes: Float[Tensor, "B C H W"], table: Float[Tensor, "8 8"], quality: Float[Tensor, " B"]
) -> Float[Tensor, "B C H W"]:
    """Planes after rounding the coefficients of the cosine transform of 8 x 8 blocks."""
    scale = torch.where(quality < 50, 5000 / quality.clamp(min=1), 200 - 2 * quality)
    steps = ((table * scale[:, None, None] + 50) / 100).floor().clamp(1, 255)[:, None, None, None]
    k = torch.arange(8, device=planes.device)
    cosine = torch.cos((2 * k + 1) * k[:, None] * math.pi / 16) / 2
    cosine[0] /= math.sqrt(2)
    blocks = planes.unflatten(-1, (-1, 8)).unflatten(-3, (-1, 8)).transpose(-3, -2)  # [B, C, rows, columns, 8, 8]
    coefficients = (cosine @ blocks @ cosine.T / steps).round() * steps
    return (cosine.T @ coefficients @ cosine).transpose(-3, -2).flatten(-2).flatten(-3, -2)


def _falling_light(amount: Float[Tensor, " B"], angle: Float[Tensor, " B"], side: int) -> Float[Tensor, "B 1 H W"]:
    """Light between 1 - amount and 1 + amount along a direction."""
    place = torch.linspace(-1, 1, side, device=amount.device)
    ramp = _wide(angle.cos()) * place + _wide(angle.sin()) * place[:, None]
    return 1 + _wide(amount) * ramp / math.sqrt(2)


def _wide(values: Float[Tensor, " B"]) -> Float[Tensor, "B 1 1 1"]:
    """One value a picture."""
    return values[:, None, None, None]
