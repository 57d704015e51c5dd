"""Embeddings of flow time and of positions."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Num
from torch import Tensor, nn


def timestep_embedding(t: Float[Tensor, " B"], dim: int, max_period: float = 10000.0) -> Float[Tensor, "B dim"]:
    """[cos(t f_i), sin(t f_i)] in float32, f_i = max_period^(-i / (dim // 2)); an odd last column is zero.

    The order of TRELLIS (sparse_structure_flow.py, TimestepEmbedder) and FLUX. Models of this package embed 1000 t.
    """
    half = dim // 2
    frequencies = torch.exp(torch.arange(half, device=t.device, dtype=torch.float32) * (-math.log(max_period) / half))
    angles = t.float()[:, None] * frequencies
    embedding = torch.cat([angles.cos(), angles.sin()], dim=-1)
    return nn.functional.pad(embedding, (0, dim % 2))


class TimeEmbedding(nn.Module):
    """Flow time t in [0, 1] -> [B, width]: sinusoids of 1000 t through a two-layer MLP, never in autocast's dtype."""

    def __init__(self, width: int, num_frequencies: int = 256) -> None:
        super().__init__()
        self.num_frequencies = num_frequencies
        self.expand = nn.Linear(num_frequencies, width)
        self.contract = nn.Linear(width, width)

    def forward(self, t: Float[Tensor, " B"]) -> Float[Tensor, "B width"]:
        with torch.autocast(t.device.type, enabled=False):
            embedding = timestep_embedding(1000.0 * t.float(), self.num_frequencies)
            return self.contract(nn.functional.silu(self.expand(embedding.to(self.expand.weight.dtype))))


def sincos_embedding(positions: Num[Tensor, "*L axes"], channels: int) -> Float[Tensor, "*L channels"]:
    """Absolute positions as float32 sines and cosines.

    Every axis gets `channels // axes // 2` frequencies 10000^(-i/n), first the sines, then the cosines; axes follow
    each other and the end is padded with zeros (trellis/modules/transformer/blocks.py, AbsolutePositionEmbedder).
    """
    num_axes = positions.shape[-1]
    count = channels // num_axes // 2
    if count == 0:
        raise ValueError(f"{channels} channels are too few for the positions of {num_axes} axes: use {2 * num_axes}")
    exponent = torch.arange(count, device=positions.device, dtype=torch.float32) / count
    angles = positions.float()[..., None] * torch.pow(10000.0, -exponent)
    embedding = torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(-2)
    return nn.functional.pad(embedding, (0, channels - embedding.shape[-1]))


def patch_grid(h: int, w: int, device: torch.device | str | None = None) -> Float[Tensor, "patches 2"]:
    """Row and column indices of h x w patches, row-major."""
    steps = [torch.arange(n, dtype=torch.float32, device=device) for n in (h, w)]
    return torch.cartesian_prod(*steps)


def flatten_condition(
    condition: Float[Tensor, "B *tokens C"], channels: int, batch_size: int
) -> tuple[Float[Tensor, "B T C"], tuple[int, int, int] | None]:
    """Condition tokens as [B, T, C], with (images, rows, columns) where the input told them.

    Args:
        condition: [B, M, h, w, C] for M images of h x w patches each, or [B, T, C].
        channels: the C that the model was built for.
        batch_size: the B of the model's input.
    """
    if condition.ndim not in (3, 5) or condition.shape[0] != batch_size or condition.shape[-1] != channels:
        raise ValueError(
            f"condition has shape {tuple(condition.shape)}, expected [{batch_size}, images, rows, columns, {channels}]"
            f" or [{batch_size}, tokens, {channels}]"
        )
    if condition.ndim == 3:
        return condition, None
    images, h, w = condition.shape[1:4]
    return condition.flatten(1, 3), (images, h, w)


def position_condition(tokens: Float[Tensor, "B T C"], shape: tuple[int, int, int] | None) -> Float[Tensor, "B T C"]:
    """Condition tokens plus 2D sin/cos of their row and column, for features that carry no position of their own."""
    if shape is None:
        raise ValueError(
            f"condition tokens of shape {tuple(tokens.shape)} have no rows and columns: positions need "
            "[B, images, rows, columns, channels]"
        )
    images, h, w = shape
    places = sincos_embedding(patch_grid(h, w, tokens.device), tokens.shape[-1])
    return tokens + places.repeat(images, 1).to(tokens.dtype)
