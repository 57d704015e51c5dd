"""Adaptive layer norm: shift, scale and gate of a block as functions of flow time."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from marope import use_triton
from sparse_vae import LayerNorm32
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
    x: Float[Tensor, "R C"],
    shift: Float[Tensor, "B C"],
    scale: Float[Tensor, "B C"],
    rows: Rows,
    eps: float = 1e-6,
    silu: bool = False,
) -> Float[Tensor, "R C"]:
    """`layer_norm(x) * (1 + scale) + shift`, then SiLU if asked for; float32 inside.

    The result has the dtype of `x`, or under autocast that of the product which follows.
    """
    if use_triton(x, shift, scale):
        from smdit import _triton  # not at the top: it imports Triton

        return _triton.norm(x, shift, scale, rows, eps, 1.0, silu, compute_dtype(x))
    shift, scale = rows.spread(torch.cat([shift, scale], dim=-1).float()).chunk(2, dim=-1)
    y = torch.addcmul(shift, F.layer_norm(x.float(), x.shape[-1:], eps=eps), 1 + scale)
    return (F.silu(y) if silu else y).to(compute_dtype(x))


def affine_norm(x: Float[Tensor, "R C"], norm: LayerNorm32, rows: Rows, silu: bool = False) -> Float[Tensor, "R C"]:
    """`norm(x)` for a norm with weight and bias, then SiLU if asked for; dtypes as in `modulated_norm`."""
    if use_triton(x, norm.weight, norm.bias):
        from smdit import _triton

        weight, bias = norm.weight[None], norm.bias[None]
        return _triton.norm(x, bias, weight, rows.as_one, norm.eps, 0.0, silu, compute_dtype(x))
    y = F.layer_norm(x.float(), norm.normalized_shape, norm.weight.float(), norm.bias.float(), norm.eps)
    return (F.silu(y) if silu else y).to(compute_dtype(x))


def gated(
    x: Float[Tensor, "R C"], update: Float[Tensor, "R C"], gate: Float[Tensor, "B C"], rows: Rows
) -> Float[Tensor, "R C"]:
    """`x + gate * update` in float32, returned in the dtype of `x`."""
    if use_triton(x, update, gate):
        from smdit import _triton

        return _triton.gate(x, update, gate, rows)
    return torch.addcmul(x.float(), rows.spread(gate.float()), update.float()).to(x.dtype)


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a product of `x` would run: autocast's where it is on."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
