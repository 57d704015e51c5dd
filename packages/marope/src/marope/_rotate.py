"""Applying a rotary table: the half of a rotary embedding that runs in every layer."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from marope._frequencies import RotaryTable


def apply_rotary(
    x: Float[Tensor, "*batch L heads head_dim"],
    table: RotaryTable,
    *,
    interleaved: bool = True,
) -> Float[Tensor, "*batch L heads head_dim"]:
    """Rotate every pair of channels of `x` by the angle that `table` holds for its token; the dtype of `x` is kept.

    Args:
        x: queries or keys, padded [B, L, H, D] or packed [L, H, D].
        table: from `rotary_table`, with `L` rows and D / 2 columns, possibly with leading batch axes.
        interleaved: pairs are neighbours (2i, 2i+1), as in FLUX and TRELLIS; otherwise (i, i + D/2), as in GPT-NeoX.

    The products are formed in float32 at least, also when `x` is bfloat16 or autocast is on.
    """
    check_table(x, table)
    cos, sin = table
    half = cos.shape[-1]
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    cos, sin = cos.unsqueeze(-2).to(wide.dtype), sin.unsqueeze(-2).to(wide.dtype)
    if not interleaved:
        first, second = wide.chunk(2, dim=-1)
        out = torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1)
    elif torch.compiler.is_compiling() or x.device.type == "mps":
        first, second = wide.unflatten(-1, (half, 2)).unbind(-1)
        out = torch.stack((first * cos - second * sin, first * sin + second * cos), dim=-1).flatten(-2)
    else:
        # One pass over the data where the expression above takes seven; a compiler fuses those, but not this.
        pairs = torch.view_as_complex(_aligned(wide).unflatten(-1, (half, 2)))
        out = torch.view_as_real(pairs * torch.complex(cos, sin)).flatten(-2)
    return out.to(x.dtype)


def check_table(x: Tensor, table: RotaryTable) -> None:
    """A ValueError where a table does not have a row for every token of `x` [..., L, heads, head_dim]."""
    length, half = table.cos.shape[-2:]
    if x.ndim < 3 or x.shape[-3] != length or x.shape[-1] != 2 * half:
        raise ValueError(
            f"x of shape {tuple(x.shape)} does not fit a table of {length} tokens and {half} pairs: "
            f"expected [..., {length}, heads, {2 * half}]"
        )


def _aligned(x: Tensor) -> Tensor:
    """`x`, copied if its pairs of neighbours cannot be read as complex numbers in place."""
    *outer, inner = x.stride()
    even = all(stride % 2 == 0 for stride in outer) and x.storage_offset() % 2 == 0
    return x if inner == 1 and even else x.clone(memory_format=torch.contiguous_format)
