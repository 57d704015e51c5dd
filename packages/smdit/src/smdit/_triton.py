"""Kernels of the modulated norm and of the gated residual. Imported only where they are used, since it imports Triton.

Each reads and writes every row once, in either direction. No kernel is specialised on a number of rows.
"""

from __future__ import annotations

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from smdit._rows import Rows

BLOCK_ELEMENTS = 4096
"""Channels that a program holds."""
BLOCK_CHANNELS = 1024
"""Fewest channels of a row that a program holds. Narrower rows are padded, so that all share one kernel to build."""


def norm(
    x: Tensor, shift: Tensor, scale: Tensor, rows: Rows, eps: float, offset: float, silu: bool, dtype: torch.dtype
) -> Tensor:
    """`act(layer_norm(x) * (offset + scale) + shift)` in `dtype`; shift, scale [B, C] for the objects of `rows`."""
    x, shift, scale = _channels_last(x, shift, scale)
    run = _Norm.apply if _is_recorded(x, shift, scale) else _norm
    return run(x, shift, scale, rows, eps, offset, silu, dtype)


def gate(x: Tensor, update: Tensor, factor: Tensor, rows: Rows) -> Tensor:
    """`x + factor * update` in the dtype of `x`; the factor is [B, C] for the objects of `rows`."""
    x, update, factor = _channels_last(x, update, factor)
    run = _Gate.apply if _is_recorded(x, update, factor) else _gate
    return run(x, update, factor, rows)


def _is_recorded(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _norm(x, shift, scale, rows, eps, offset, silu, dtype):
    num_rows, channels = x.shape
    out = torch.empty(num_rows, channels, dtype=dtype, device=x.device)
    if num_rows:
        block_c, block_r = _blocks(channels)
        with torch.cuda.device_of(x):
            _norm_kernel[(triton.cdiv(max(rows.lengths), block_r), len(rows.lengths))](
                x, shift, scale, rows.begins, out, x.stride(0), shift.stride(0), scale.stride(0), eps, channels, offset,
                silu, BLOCK_R=block_r, BLOCK_C=block_c, num_warps=4,
            )  # fmt: skip
    return out


def _gate(x, update, factor, rows):
    num_rows, channels = x.shape
    out = torch.empty(num_rows, channels, dtype=x.dtype, device=x.device)
    if num_rows:
        block_c, block_r = _blocks(channels)
        with torch.cuda.device_of(x):
            _gate_kernel[(triton.cdiv(max(rows.lengths), block_r), len(rows.lengths))](
                x, update, factor, rows.begins, out, x.stride(0), update.stride(0), factor.stride(0), channels,
                BLOCK_R=block_r, BLOCK_C=block_c, num_warps=4,
            )  # fmt: skip
    return out


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, shift, scale, rows, eps, offset, silu, dtype):
        ctx.save_for_backward(x, shift, scale)
        ctx.rows, ctx.options = rows, (eps, offset, silu)
        return _norm(x, shift, scale, rows, eps, offset, silu, dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, shift, scale = ctx.saved_tensors
        eps, offset, silu = ctx.options
        channels = x.shape[1]
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        block_c, block_r = _blocks(channels)
        pieces = ctx.rows.pieces(8 * block_r)
        partial = torch.empty(len(pieces.object), 2, channels, dtype=torch.float32, device=x.device)
        if out.numel():
            with torch.cuda.device_of(x):
                _norm_backward_kernel[(len(pieces.object),)](
                    x, grad.contiguous(), shift, scale, pieces.object, pieces.begin, pieces.end, out, partial,
                    x.stride(0), shift.stride(0), scale.stride(0), eps, channels, offset, silu,
                    BLOCK_R=block_r, BLOCK_C=block_c, num_warps=4,
                )  # fmt: skip
        sums = pieces.sum(partial)
        return out, sums[:, 0].to(shift.dtype), sums[:, 1].to(scale.dtype), None, None, None, None, None


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, update, factor, rows):
        ctx.save_for_backward(update, factor)
        ctx.rows = rows
        return _gate(x, update, factor, rows)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        update, factor = ctx.saved_tensors
        channels = update.shape[1]
        grad = grad.contiguous()
        out = torch.empty(update.shape, dtype=update.dtype, device=update.device)
        block_c, block_r = _blocks(channels)
        pieces = ctx.rows.pieces(8 * block_r)
        partial = torch.empty(len(pieces.object), 1, channels, dtype=torch.float32, device=update.device)
        if out.numel():
            with torch.cuda.device_of(update):
                _gate_backward_kernel[(len(pieces.object),)](
                    update, grad, factor, pieces.object, pieces.begin, pieces.end, out, partial, update.stride(0),
                    factor.stride(0), channels, BLOCK_R=block_r, BLOCK_C=block_c, num_warps=4,
                )  # fmt: skip
        return grad, out, pieces.sum(partial)[:, 0].to(factor.dtype), None


def _blocks(channels: int) -> tuple[int, int]:
    """Channels, padded to a power of two, and rows of a program."""
    block_c = max(triton.next_power_of_2(channels), BLOCK_CHANNELS)
    return block_c, max(1, BLOCK_ELEMENTS // block_c)


def _channels_last(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(x if x.stride(-1) == 1 else x.contiguous() for x in tensors)


# `no_type_check` keeps checkers of annotations at run time away from functions that never run as Python.


@triton.jit
@no_type_check
def _normalised(x, rows, present, c, stride, eps, channels):
    """Rows of `x` with mean 0 and variance 1, float32, zero beyond the channels, and the factor that made them so."""
    value = tl.load(x + rows.to(tl.int64)[:, None] * stride + c[None, :], mask=present, other=0.0).to(tl.float32)
    mean = tl.sum(value, axis=1) / channels
    value = tl.where(c[None, :] < channels, value - mean[:, None], 0.0)
    factor = tl.rsqrt(tl.sum(value * value, axis=1) / channels + eps)[:, None]
    return value * factor, factor


@triton.jit(do_not_specialize=["offset", "silu"])
@no_type_check
def _norm_kernel(
    x, shift, scale, begins, out, x_stride, shift_stride, scale_stride, eps, channels, offset, silu,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Some rows of one object, so that its shift and scale are read once for all of them."""
    owner = tl.program_id(1).to(tl.int64)
    rows = tl.load(begins + owner) + tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    c = tl.arange(0, BLOCK_C)
    known = (c < channels)[None, :]
    present = (rows < tl.load(begins + owner + 1))[:, None] & known
    value, _ = _normalised(x, rows, present, c, x_stride, eps, channels)
    a = tl.load(scale + owner * scale_stride + c[None, :], mask=known, other=0.0).to(tl.float32)
    b = tl.load(shift + owner * shift_stride + c[None, :], mask=known, other=0.0).to(tl.float32)
    value = value * (offset + a) + b
    value = tl.where(silu, value * tl.sigmoid(value), value)
    tl.store(out + rows.to(tl.int64)[:, None] * channels + c[None, :], value.to(out.dtype.element_ty), mask=present)


@triton.jit(do_not_specialize=["offset", "silu"])
@no_type_check
def _norm_backward_kernel(
    x, grad, shift, scale, objects, begins, ends, out, partial, x_stride, shift_stride, scale_stride, eps, channels,
    offset, silu, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A run of rows of one object: their gradient, and their share of the gradients of shift and scale."""
    piece = tl.program_id(0)
    owner = tl.load(objects + piece).to(tl.int64)
    begin, end = tl.load(begins + piece), tl.load(ends + piece)
    c = tl.arange(0, BLOCK_C)
    known = (c < channels)[None, :]
    a = offset + tl.load(scale + owner * scale_stride + c[None, :], mask=known, other=0.0).to(tl.float32)
    b = tl.load(shift + owner * shift_stride + c[None, :], mask=known, other=0.0).to(tl.float32)
    shift_sum = tl.zeros((BLOCK_C,), tl.float32)
    scale_sum = tl.zeros((BLOCK_C,), tl.float32)
    for first in range(begin, end, BLOCK_R):
        rows = first + tl.arange(0, BLOCK_R)
        present = (rows < end)[:, None] & known
        value, factor = _normalised(x, rows, present, c, x_stride, eps, channels)
        place = rows.to(tl.int64)[:, None] * channels + c[None, :]
        g = tl.load(grad + place, mask=present, other=0.0).to(tl.float32)
        y = value * a + b
        s = tl.sigmoid(y)
        g = tl.where(silu, g * s * (1 + y * (1 - s)), g)
        shift_sum += tl.sum(g, axis=0)
        scale_sum += tl.sum(g * value, axis=0)
        g = g * a
        mean = tl.sum(g, axis=1) / channels
        along = tl.sum(g * value, axis=1) / channels
        dx = (g - mean[:, None] - value * along[:, None]) * factor
        tl.store(out + place, dx.to(out.dtype.element_ty), mask=present)
    sums = partial + piece.to(tl.int64) * 2 * channels + c
    tl.store(sums, shift_sum, mask=c < channels)
    tl.store(sums + channels, scale_sum, mask=c < channels)


@triton.jit
@no_type_check
def _gate_kernel(
    x, update, factor, begins, out, x_stride, update_stride, factor_stride, channels,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Some rows of one object, so that its factor is read once for all of them."""
    owner = tl.program_id(1).to(tl.int64)
    rows = tl.load(begins + owner) + tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    c = tl.arange(0, BLOCK_C)
    known = (c < channels)[None, :]
    present = (rows < tl.load(begins + owner + 1))[:, None] & known
    row = rows.to(tl.int64)[:, None]
    value = tl.load(x + row * x_stride + c[None, :], mask=present, other=0.0).to(tl.float32)
    change = tl.load(update + row * update_stride + c[None, :], mask=present, other=0.0).to(tl.float32)
    a = tl.load(factor + owner * factor_stride + c[None, :], mask=known, other=0.0).to(tl.float32)
    tl.store(out + row * channels + c[None, :], (value + a * change).to(out.dtype.element_ty), mask=present)


@triton.jit
@no_type_check
def _gate_backward_kernel(
    update, grad, factor, objects, begins, ends, out, partial, update_stride, factor_stride, channels,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A run of rows of one object: the gradient of their updates, and their share of the factor's gradient."""
    piece = tl.program_id(0)
    owner = tl.load(objects + piece).to(tl.int64)
    begin, end = tl.load(begins + piece), tl.load(ends + piece)
    c = tl.arange(0, BLOCK_C)
    known = (c < channels)[None, :]
    a = tl.load(factor + owner * factor_stride + c[None, :], mask=known, other=0.0).to(tl.float32)
    total = tl.zeros((BLOCK_C,), tl.float32)
    for first in range(begin, end, BLOCK_R):
        rows = first + tl.arange(0, BLOCK_R)
        present = (rows < end)[:, None] & known
        row = rows.to(tl.int64)[:, None]
        g = tl.load(grad + row * channels + c[None, :], mask=present, other=0.0).to(tl.float32)
        change = tl.load(update + row * update_stride + c[None, :], mask=present, other=0.0).to(tl.float32)
        total += tl.sum(g * change, axis=0)
        tl.store(out + row * channels + c[None, :], (g * a).to(out.dtype.element_ty), mask=present)
    tl.store(partial + piece.to(tl.int64) * channels + c, total, mask=c < channels)
