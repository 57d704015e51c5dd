"""The kernels of `norm_rotary`. Imported only where it is used, since it imports Triton.

No kernel is specialised on a number of tokens, so nothing is compiled again when lengths change.
"""

from __future__ import annotations

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from marope._frequencies import RotaryTable

BLOCK_ELEMENTS = 4096
"""Channels that a program of the forward holds."""
BLOCK_TOKENS = 64
"""Tokens that a program of the backward handles, for one head."""


def norm_rotary(
    q: Tensor,
    k: Tensor,
    table: RotaryTable | None,
    q_weight: Tensor,
    k_weight: Tensor,
    eps: float,
    interleaved: bool,
) -> tuple[Tensor, Tensor]:
    """`marope.norm_rotary` for checked arguments on CUDA."""
    if not torch.is_grad_enabled() or not any(x.requires_grad for x in (q, k, q_weight, k_weight)):
        return _forward(q, k, table, q_weight, k_weight, eps, interleaved)
    cos, sin = (None, None) if table is None else table
    return _NormRotary.apply(q, k, cos, sin, q_weight, k_weight, eps, interleaved)


class _NormRotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, cos, sin, q_weight, k_weight, eps, interleaved):
        ctx.save_for_backward(q, k, cos, sin, q_weight, k_weight)
        ctx.eps, ctx.interleaved = eps, interleaved
        table = None if cos is None else RotaryTable(cos, sin)
        return _forward(q, k, table, q_weight, k_weight, eps, interleaved)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, q_grad, k_grad):
        q, k, cos, sin, q_weight, k_weight = ctx.saved_tensors
        table = None if cos is None else RotaryTable(cos, sin)
        q_out, k_out, q_partial, k_partial = _backward(
            (q, k), (q_grad, k_grad), table, (q_weight, k_weight), ctx.eps, ctx.interleaved
        )
        weights = [
            partial.sum(dim=0 if weight.ndim == 2 else (0, 1)).to(weight.dtype)
            for partial, weight in ((q_partial, q_weight), (k_partial, k_weight))
        ]
        return q_out, k_out, None, None, *weights, None, None


def _forward(q, k, table, q_weight, k_weight, eps, interleaved):
    outs = (
        torch.empty_like(q, memory_format=torch.contiguous_format),
        torch.empty_like(k, memory_format=torch.contiguous_format),
    )
    if q.numel() == 0:
        return outs
    q, k = _packed(q, k)
    tokens, heads, head_dim = q.shape
    half = triton.next_power_of_2(head_dim // 2)
    block = max(1, BLOCK_ELEMENTS // (2 * half))
    cos, sin, rows = _table(table, q)
    with torch.cuda.device_of(q):
        _forward_kernel[(triton.cdiv(tokens * heads, block), 2)](
            q, k, cos, sin, q_weight, k_weight, *outs, tokens * heads, rows, eps,
            q.stride(0), q.stride(1), k.stride(0), k.stride(1),
            HEADS=heads, HALF=head_dim // 2, BLOCK_R=block, BLOCK_HALF=half, ROTATE=table is not None,
            INTERLEAVED=interleaved, HEAD_WEIGHTS=q_weight.ndim == 2, num_warps=4,
        )  # fmt: skip
    return outs


def _backward(inputs, grads, table, weights, eps, interleaved):
    shape = inputs[0].shape
    outs = [torch.empty(shape, dtype=x.dtype, device=x.device) for x in inputs]
    q, k = _packed(*inputs)
    tokens, heads, head_dim = q.shape
    blocks = triton.cdiv(tokens, BLOCK_TOKENS)
    partials = [torch.empty(blocks, heads, head_dim, dtype=torch.float32, device=q.device) for _ in inputs]
    if q.numel() == 0:
        return *outs, *partials
    cos, sin, rows = _table(table, q)
    with torch.cuda.device_of(q):
        _backward_kernel[(blocks, heads, 2)](
            q, k, *(g.contiguous() for g in grads), cos, sin, *weights, *outs, *partials, tokens, rows, eps,
            q.stride(0), q.stride(1), k.stride(0), k.stride(1),
            HEADS=heads, HALF=head_dim // 2, BLOCK_T=BLOCK_TOKENS, BLOCK_HALF=triton.next_power_of_2(head_dim // 2),
            ROTATE=table is not None, INTERLEAVED=interleaved, HEAD_WEIGHTS=weights[0].ndim == 2, num_warps=4,
        )  # fmt: skip
    return *outs, *partials


def _packed(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Both as [tokens, heads, head_dim] with channels side by side, copied where a view cannot be."""
    return tuple((x if x.stride(-1) == 1 else x.contiguous()).flatten(0, -3) for x in (q, k))  # type: ignore[return-value]


def _table(table: RotaryTable | None, x: Tensor) -> tuple[Tensor, Tensor, int]:
    """Cosines, sines and their number of rows; the row of token i is i modulo that number."""
    if table is None:
        return x, x, 1  # never read
    cos, sin = (part.float().contiguous() for part in table)
    return cos, sin, cos.numel() // cos.shape[-1]


# `no_type_check` keeps checkers of annotations at run time away from functions that never run as Python.


@triton.jit
@no_type_check
def _load_pairs(x, present, HALF: tl.constexpr, BLOCK_HALF: tl.constexpr, INTERLEAVED: tl.constexpr):
    """The two channels of every pair, float32 [rows, BLOCK_HALF] each; `x` points to the rows [rows, 1]."""
    pair = tl.arange(0, BLOCK_HALF)[None, :]
    if INTERLEAVED:
        channel = tl.arange(0, 2 * BLOCK_HALF)[None, :]
        both = tl.load(x + channel, mask=present & (channel < 2 * HALF), other=0.0).to(tl.float32)
        first, second = tl.split(tl.reshape(both, both.shape[0], BLOCK_HALF, 2))
    else:
        first = tl.load(x + pair, mask=present & (pair < HALF), other=0.0).to(tl.float32)
        second = tl.load(x + HALF + pair, mask=present & (pair < HALF), other=0.0).to(tl.float32)
    return first, second


@triton.jit
@no_type_check
def _store_pairs(x, first, second, present, HALF: tl.constexpr, BLOCK_HALF: tl.constexpr, INTERLEAVED: tl.constexpr):
    """The opposite of `_load_pairs`."""
    dtype = x.dtype.element_ty
    pair = tl.arange(0, BLOCK_HALF)[None, :]
    if INTERLEAVED:
        channel = tl.arange(0, 2 * BLOCK_HALF)[None, :]
        both = tl.reshape(tl.join(first.to(dtype), second.to(dtype)), first.shape[0], 2 * BLOCK_HALF)
        tl.store(x + channel, both, mask=present & (channel < 2 * HALF))
    else:
        tl.store(x + pair, first.to(dtype), mask=present & (pair < HALF))
        tl.store(x + HALF + pair, second.to(dtype), mask=present & (pair < HALF))


@triton.jit
@no_type_check
def _rotate_rows(
    x, cos, sin, weight, out, num_rows, table_rows, eps, stride_token, stride_head,
    HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_HALF: tl.constexpr,
    ROTATE: tl.constexpr, INTERLEAVED: tl.constexpr, HEAD_WEIGHTS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    present = (row < num_rows)[:, None]
    token, head = row // HEADS, row % HEADS
    start = x + (token.to(tl.int64) * stride_token + head * stride_head)[:, None]
    first, second = _load_pairs(start, present, HALF, BLOCK_HALF, INTERLEAVED)
    scale = tl.rsqrt(tl.sum(first * first + second * second, axis=1) / (2 * HALF) + eps)[:, None]
    if HEAD_WEIGHTS:
        factors = weight + (head * 2 * HALF)[:, None]
        known = present
    else:
        factors = weight + tl.zeros((1, 1), tl.int32)
        known = tl.full((1, 1), True, tl.int1)
    first_weight, second_weight = _load_pairs(factors, known, HALF, BLOCK_HALF, INTERLEAVED)
    first = first * scale * first_weight
    second = second * scale * second_weight
    if ROTATE:
        pair = tl.arange(0, BLOCK_HALF)[None, :]
        place = (token % table_rows).to(tl.int64)[:, None] * HALF + pair
        c = tl.load(cos + place, mask=present & (pair < HALF), other=0.0)
        s = tl.load(sin + place, mask=present & (pair < HALF), other=0.0)
        first, second = first * c - second * s, first * s + second * c
    _store_pairs(out + row.to(tl.int64)[:, None] * (2 * HALF), first, second, present, HALF, BLOCK_HALF, INTERLEAVED)


@triton.jit(do_not_specialize=["num_rows", "table_rows"])
@no_type_check
def _forward_kernel(
    q, k, cos, sin, q_weight, k_weight, q_out, k_out, num_rows, table_rows, eps, q_token, q_head, k_token, k_head,
    HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_HALF: tl.constexpr,
    ROTATE: tl.constexpr, INTERLEAVED: tl.constexpr, HEAD_WEIGHTS: tl.constexpr,
):  # fmt: skip
    """Rows are (token, head); the second axis of the grid is queries, keys."""
    if tl.program_id(1) == 0:
        _rotate_rows(q, cos, sin, q_weight, q_out, num_rows, table_rows, eps, q_token, q_head,
                     HEADS, HALF, BLOCK_R, BLOCK_HALF, ROTATE, INTERLEAVED, HEAD_WEIGHTS)  # fmt: skip
    else:
        _rotate_rows(k, cos, sin, k_weight, k_out, num_rows, table_rows, eps, k_token, k_head,
                     HEADS, HALF, BLOCK_R, BLOCK_HALF, ROTATE, INTERLEAVED, HEAD_WEIGHTS)  # fmt: skip


@triton.jit
@no_type_check
def _gradient_rows(
    x, grad, cos, sin, weight, out, partial, num_tokens, table_rows, eps, stride_token, stride_head,
    HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_HALF: tl.constexpr,
    ROTATE: tl.constexpr, INTERLEAVED: tl.constexpr, HEAD_WEIGHTS: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    present = (token < num_tokens)[:, None]
    start = x + (token.to(tl.int64) * stride_token + head * stride_head)[:, None]
    first, second = _load_pairs(start, present, HALF, BLOCK_HALF, INTERLEAVED)
    packed = (token.to(tl.int64) * HEADS + head)[:, None] * (2 * HALF)
    upper, lower = _load_pairs(grad + packed, present, HALF, BLOCK_HALF, INTERLEAVED)
    if ROTATE:
        pair = tl.arange(0, BLOCK_HALF)[None, :]
        place = (token % table_rows).to(tl.int64)[:, None] * HALF + pair
        c = tl.load(cos + place, mask=present & (pair < HALF), other=0.0)
        s = tl.load(sin + place, mask=present & (pair < HALF), other=0.0)
        upper, lower = upper * c + lower * s, lower * c - upper * s
    factors = weight + tl.zeros((1, 1), tl.int32)
    if HEAD_WEIGHTS:
        factors += head * 2 * HALF
    known = tl.full((1, 1), True, tl.int1)
    first_weight, second_weight = _load_pairs(factors, known, HALF, BLOCK_HALF, INTERLEAVED)
    scale = tl.rsqrt(tl.sum(first * first + second * second, axis=1) / (2 * HALF) + eps)[:, None]
    first, second = first * scale, second * scale
    sums = partial + (tl.program_id(0) * HEADS + head) * (2 * HALF) + tl.zeros((1, 1), tl.int32)
    first_sum = tl.sum(upper * first, axis=0, keep_dims=True)
    second_sum = tl.sum(lower * second, axis=0, keep_dims=True)
    _store_pairs(sums, first_sum, second_sum, known, HALF, BLOCK_HALF, INTERLEAVED)
    upper, lower = upper * first_weight, lower * second_weight
    along = (tl.sum(upper * first + lower * second, axis=1) / (2 * HALF))[:, None]
    _store_pairs(
        out + packed, (upper - first * along) * scale, (lower - second * along) * scale, present,
        HALF, BLOCK_HALF, INTERLEAVED,
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_tokens", "table_rows"])
@no_type_check
def _backward_kernel(
    q, k, q_grad, k_grad, cos, sin, q_weight, k_weight, q_out, k_out, q_partial, k_partial, num_tokens, table_rows, eps,
    q_token, q_head, k_token, k_head,
    HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_HALF: tl.constexpr,
    ROTATE: tl.constexpr, INTERLEAVED: tl.constexpr, HEAD_WEIGHTS: tl.constexpr,
):  # fmt: skip
    """Gradient of a block of tokens in one head, and their share of the weight's gradient."""
    if tl.program_id(2) == 0:
        _gradient_rows(q, q_grad, cos, sin, q_weight, q_out, q_partial, num_tokens, table_rows, eps, q_token, q_head,
                       HEADS, HALF, BLOCK_T, BLOCK_HALF, ROTATE, INTERLEAVED, HEAD_WEIGHTS)  # fmt: skip
    else:
        _gradient_rows(k, k_grad, cos, sin, k_weight, k_out, k_partial, num_tokens, table_rows, eps, k_token, k_head,
                       HEADS, HALF, BLOCK_T, BLOCK_HALF, ROTATE, INTERLEAVED, HEAD_WEIGHTS)  # fmt: skip
