"""Decoder outputs -> Gaussians (TRELLIS decoder_gs.py and gaussian_model.py)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from gs_render import Gaussians
from jaxtyping import Float
from torch import Tensor

from sparse_vae._config import GaussianConfig
from sparse_vae._topology import Topology

_SIZES = (3, 3, 3, 4, 1)
"""Channels a Gaussian: offset, colour, scale, rotation, opacity."""


def channels_per_voxel(config: GaussianConfig) -> int:
    """Output channels that `to_gaussians` expects for every voxel."""
    return sum(_SIZES) * config.num_gaussians


def to_gaussians(raw: Float[Tensor, "N D"], topology: Topology, config: GaussianConfig) -> list[Gaussians]:
    """Turn the decoder's output into activated Gaussians; all arithmetic in float32 whatever the dtype of `raw`.

    Args:
        raw: [N, 14 G], channels blocked by attribute: G offsets (3), colours (3), scales (3), rotations (4),
            opacities (1).
        topology: voxels of the N rows.
        config: constants and activations.

    Returns:
        One `Gaussians` an object; row v G + g is Gaussian g of the object's voxel v.
    """
    count = config.num_gaussians
    blocks = raw.float().split([size * count for size in _SIZES], dim=1)
    offset, color, scale, rotation, opacity = (
        block.unflatten(1, (count, size)) for block, size in zip(blocks, _SIZES, strict=True)
    )
    centre = (topology.coords[:, 1:].float() + 0.5) / topology.grid_size - 0.5
    reach = 0.5 * config.offset_range / topology.grid_size
    start = topology.memo(("offset_start", config), lambda: offset_start(config).to(raw.device))
    means = centre[:, None] + torch.tanh(offset * config.means_multiplier + start) * reach
    fields = (
        means,
        activate_scales(scale * config.scales_multiplier, config),
        _activate_rotation(rotation * config.rotation_multiplier),
        torch.sigmoid(opacity * config.opacity_multiplier + _logit(config.opacity_bias))[..., 0],
        (color * config.color_multiplier)[:, :, None],
    )
    per_object = zip(*(field.split(topology.lengths) for field in fields), strict=True)
    return [Gaussians(*(field.flatten(0, 1) for field in fields)) for fields in per_object]


def activate_scales(raw: Tensor, config: GaussianConfig) -> Tensor:
    """Raw scales -> standard deviations, `config.scale_bias` (widened by the minimum) at zero."""
    if config.scale_activation == "softplus":
        bias = config.scale_bias + math.log(-math.expm1(-config.scale_bias))
        scales = F.softplus(raw + bias)
    else:
        scales = torch.exp(raw + math.log(config.scale_bias))
    return torch.sqrt(scales.square() + config.min_scale**2)


def offset_start(config: GaussianConfig) -> Float[Tensor, "G 3"]:
    """Argument of the tanh for a zero output: its images spread evenly over the voxel (a Hammersley set)."""
    count = config.num_gaussians
    if not config.perturb_offset:
        return torch.zeros(count, 3)
    points = torch.tensor([[i / count, _radical_inverse(i, 2), _radical_inverse(i, 3)] for i in range(count)])
    return torch.atanh((2 * points - 1) / config.offset_range)


def _activate_rotation(raw: Tensor) -> Tensor:
    """Raw rotation -> unit quaternion wxyz, the identity at zero."""
    # Adding a constant tensor would copy it from the host in every step, and so wait for the device.
    return F.normalize(torch.cat([raw[..., :1] + 1, raw[..., 1:]], dim=-1), dim=-1)


def _radical_inverse(index: int, base: int) -> float:
    value, digit = 0.0, 1.0 / base
    while index:
        index, remainder = divmod(index, base)
        value += remainder * digit
        digit /= base
    return value


def _logit(probability: float) -> float:
    return math.log(probability / (1 - probability))
