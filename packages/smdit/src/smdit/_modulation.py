"""Adaptive layer norm: shift, scale and gate of a block as functions of flow time."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from smdit._rows import Rows


class Modulation(nn.Module):
    """[B, width] embedding -> [B, count * channels] shifts, scales and gates: `linear(silu(embedding))`.

    Zero at first (adaLN-zero), so that a block starts as the identity. Autocast does not reach it.
    """

    def __init__(self, width: int, count: int, channels: int | None = None) -> None:
        super().__init__()
        self.linear = nn.Linear(width, count * (channels or width))

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, embedding: Float[Tensor, "B width"]) -> Float[Tensor, "B out"]:
        with torch.autocast(embedding.device.type, enabled=False):
            return self.linear(F.silu(embedding.to(self.linear.weight.dtype)))


class ModulationBias(nn.Module):
    """What a block adds to a modulation that all blocks of its kind share."""

    def __init__(self, width: int, count: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(count * width))

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.bias)

    def forward(self, shared: Float[Tensor, "B out"]) -> Float[Tensor, "B out"]:
        return shared + self.bias


def modulated_norm(
    x: Float[Tensor, "R C"], shift: Float[Tensor, "B C"], scale: Float[Tensor, "B C"], rows: Rows, eps: float = 1e-6
) -> Float[Tensor, "R C"]:
    """`layer_norm(x) * (1 + scale) + shift` in float32, returned in the dtype of `x`."""
    shift, scale = rows.spread(torch.cat([shift, scale], dim=-1).float()).chunk(2, dim=-1)
    return torch.addcmul(shift, F.layer_norm(x.float(), x.shape[-1:], eps=eps), 1 + scale).to(x.dtype)


def gated(
    x: Float[Tensor, "R C"], update: Float[Tensor, "R C"], gate: Float[Tensor, "B C"], rows: Rows
) -> Float[Tensor, "R C"]:
    """`x + gate * update` in float32, returned in the dtype of `x`."""
    return torch.addcmul(x.float(), rows.spread(gate.float()), update.float()).to(x.dtype)
