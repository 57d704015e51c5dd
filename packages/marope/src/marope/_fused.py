"""RMS norm of queries and keys followed by their rotation: plain PyTorch, or one Triton kernel for all of it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from marope._backend import use_triton
from marope._frequencies import RotaryTable
from marope._rotate import apply_rotary, check_table


def norm_rotary(
    q: Float[Tensor, "*batch L heads head_dim"],
    k: Float[Tensor, "*batch L heads head_dim"],
    table: RotaryTable | None,
    q_weight: Float[Tensor, "*heads head_dim"],
    k_weight: Float[Tensor, "*heads head_dim"],
    *,
    eps: float = 1e-6,
    interleaved: bool = True,
    backend: str | None = None,
) -> tuple[Float[Tensor, "*batch L heads head_dim"], Float[Tensor, "*batch L heads head_dim"]]:
    """RMS norm over every head's channels, times a weight, then `apply_rotary`; queries and keys keep their dtype.

    Args:
        q: queries, padded [B, L, H, D] or packed [L, H, D]; may be a view into a larger projection.
        k: keys, of the same shape.
        table: from `rotary_table`; None normalises only.
        q_weight: factor of the normalised queries, [D] for all heads (FLUX) or [H, D].
        k_weight: the same for the keys.
        eps: added to the mean square. TRELLIS's `MultiHeadRMSNorm`, which divides by the norm, is `eps=1e-24`.
        interleaved: which channels form a pair, see `apply_rotary`.
        backend: "triton" (CUDA; reads and writes each tensor once) or "torch" (everywhere, the oracle of the other). By
            default that of the enclosing `kernel_backend` context, else the first that is available.

    Everything between reading and writing is float32, in both backends and in their gradients.

    Raises:
        ValueError: shapes that do not fit, or an unknown backend.
        RuntimeError: the backend asked for cannot be used with these tensors; the message says why.
    """
    if q.ndim < 3 or q.shape != k.shape:
        raise ValueError(f"q and k must have one shape [..., L, heads, head_dim], got {q.shape} and {k.shape}")
    for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        if weight.shape not in (q.shape[-1:], q.shape[-2:]):
            raise ValueError(
                f"{name} has shape {tuple(weight.shape)}, expected {tuple(q.shape[-1:])} or {tuple(q.shape[-2:])}"
            )
    if table is not None:
        check_table(q, table)
    if use_triton(q, k, backend=backend):
        from marope import _triton  # not at the top: it imports Triton

        return _triton.norm_rotary(q, k, table, q_weight, k_weight, eps, interleaved)
    return _plain(q, table, q_weight, eps, interleaved), _plain(k, table, k_weight, eps, interleaved)


def _plain(x: Tensor, table: RotaryTable | None, weight: Tensor, eps: float, interleaved: bool) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    normed = F.rms_norm(x.to(wide), x.shape[-1:], None, eps) * weight.to(wide)
    return (normed if table is None else apply_rotary(normed, table, interleaved=interleaved)).to(x.dtype)
