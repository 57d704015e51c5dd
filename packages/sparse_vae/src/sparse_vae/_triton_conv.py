"""Convolution over a kernel map in Triton: gathers, multiplies and adds up in one kernel, without a gathered copy.

Imported only where it is used, since it imports Triton. No kernel is specialised on a number of rows, so that nothing
is compiled again when the next batch has other voxels; channels, offsets and strides are constants of the compilation.
"""

from functools import cache
from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from sparse_vae._kernel_map import KernelMap

PROGRAMS = 512
"""Programs that a weight gradient is split into, a few for every multiprocessor of a large GPU."""
PARTIAL_BUDGET = 2**26
"""Bytes that the partial sums of a weight gradient may take (one sum always fits)."""


def forward(x: Float[Tensor, "N C"], weight: Float[Tensor, "D K C"], kernel_map: KernelMap) -> Float[Tensor, "M D"]:
    """`out[i] = sum_k weight[:, k] @ x[sources[k, i]]`, added up in float32; the weight may have any strides."""
    out_channels, num_offsets, in_channels = weight.shape
    num_outputs = kernel_map.num_outputs
    out = x.new_empty(num_outputs, out_channels)
    if out.numel() == 0 or x.numel() == 0:
        return out.zero_()
    wide = x.element_size() == 2
    block_c = _block(in_channels, 64 if wide else 32)
    block_d = _block(out_channels, 128 if wide else 64)
    block_m = 128 if wide and num_outputs >= 2**14 else 64
    grid = (triton.cdiv(num_outputs, block_m), triton.cdiv(out_channels, block_d))
    with torch.cuda.device_of(x):
        _forward_kernel[grid](
            x.contiguous(),
            weight,
            kernel_map.sources32,
            out,
            num_outputs,
            NUM_OFFSETS=num_offsets,
            IN_CHANNELS=in_channels,
            OUT_CHANNELS=out_channels,
            STRIDE_D=weight.stride(0),
            STRIDE_K=weight.stride(1),
            STRIDE_C=weight.stride(2),
            BLOCK_M=block_m,
            BLOCK_D=block_d,
            BLOCK_C=block_c,
            PRECISION=_precision(x),
            num_warps=8 if block_m * block_d > 64 * 128 else 4,
            num_stages=3,
        )
    return out


def weight_gradient(x: Float[Tensor, "N C"], grad: Float[Tensor, "M D"], kernel_map: KernelMap) -> Tensor:
    """float32 [D, K, C]: `sum_i outer(grad[i], x[sources[k, i]])`, with sums in an order that depends on M alone."""
    num_offsets, num_outputs = kernel_map.sources.shape
    in_channels, out_channels = x.shape[1], grad.shape[1]
    shape = (out_channels, num_offsets, in_channels)
    if grad.numel() == 0 or x.numel() == 0:
        return x.new_zeros(shape, dtype=torch.float32)
    wide = x.element_size() == 2
    block_m = 64 if wide else 32
    block_d, block_c = (_block(channels, 128 if wide else 64) for channels in (out_channels, in_channels))
    tiles = (triton.cdiv(out_channels, block_d), triton.cdiv(in_channels, block_c))
    splits = min(
        triton.cdiv(PROGRAMS, num_offsets * tiles[0] * tiles[1]),
        triton.cdiv(num_outputs, 4 * block_m),
        max(1, PARTIAL_BUDGET // (4 * out_channels * num_offsets * in_channels)),
    )
    rows = triton.cdiv(num_outputs, splits * block_m) * block_m
    partial = x.new_empty(splits, *shape, dtype=torch.float32)
    with torch.cuda.device_of(x):
        _weight_gradient_kernel[(num_offsets, splits, tiles[0] * tiles[1])](
            x.contiguous(),
            grad.contiguous(),
            kernel_map.sources32,
            partial,
            num_outputs,
            rows,
            NUM_OFFSETS=num_offsets,
            IN_CHANNELS=in_channels,
            OUT_CHANNELS=out_channels,
            BLOCK_M=block_m,
            BLOCK_D=block_d,
            BLOCK_C=block_c,
            PRECISION=_precision(x),
            num_warps=8 if block_d * block_c > 64 * 128 else 4,
            num_stages=3,
        )
    return partial[0] if splits == 1 else partial.sum(dim=0)


@cache
def failure(device: torch.device) -> str | None:
    """Why a CUDA device cannot run the kernels, None if it can; launches the smallest one to find out."""
    capability = torch.cuda.get_device_capability(device)
    if torch.version.cuda and capability < (8, 0):
        return f"it needs compute capability 8.0, got {capability[0]}.{capability[1]}"
    with torch.no_grad():
        row = torch.zeros(1, 1, dtype=torch.int64, device=device)
        one = torch.ones(1, 16, dtype=torch.float16, device=device)
        try:
            forward(one, one[:, None], KernelMap(row, row, identity=0))
        except Exception as error:  # no compiler, no headers, an unknown GPU: each is a reason, not a fault
            return f"Triton cannot build a kernel ({type(error).__name__}: {error})"
    return None


def _block(channels: int, largest: int) -> int:
    """Channels of a tile: a power of two, at least the 16 that `tl.dot` asks for."""
    return min(max(16, triton.next_power_of_2(channels)), largest)


def _precision(x: Tensor) -> str:
    """What PyTorch's own float32 products use; half precision knows no difference."""
    if x.dtype != torch.float32:
        return "ieee"
    matmul = torch.backends.cuda.matmul
    # PyTorch 2.9 and later raise for `allow_tf32` once the new setting was used.
    chosen = getattr(matmul, "fp32_precision", None) or ("tf32" if matmul.allow_tf32 else "ieee")
    return "tf32" if chosen == "tf32" else "ieee"


# `no_type_check` keeps checkers of annotations at run time away from functions that never run as Python.


@triton.jit(do_not_specialize=["num_outputs"])
@no_type_check
def _forward_kernel(
    x,
    weight,
    sources,
    out,
    num_outputs,
    NUM_OFFSETS: tl.constexpr,
    IN_CHANNELS: tl.constexpr,
    OUT_CHANNELS: tl.constexpr,
    STRIDE_D: tl.constexpr,
    STRIDE_K: tl.constexpr,
    STRIDE_C: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A tile of outputs [BLOCK_M, BLOCK_D]."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_rows = rows < num_outputs
    total = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    # One flat loop over (offset, channels), which the compiler can pipeline.
    steps: tl.constexpr = (IN_CHANNELS + BLOCK_C - 1) // BLOCK_C
    for step in range(NUM_OFFSETS * steps):
        k = step // steps
        c = step % steps * BLOCK_C + tl.arange(0, BLOCK_C)
        source = tl.load(sources + k * num_outputs + rows, mask=in_rows, other=-1)
        gathered = tl.load(
            x + source.to(tl.int64)[:, None] * IN_CHANNELS + c[None, :],
            mask=(source >= 0)[:, None] & (c < IN_CHANNELS)[None, :],
            other=0.0,
        )
        matrix = tl.load(
            weight + k * STRIDE_K + c[:, None] * STRIDE_C + d[None, :] * STRIDE_D,
            mask=(c < IN_CHANNELS)[:, None] & (d < OUT_CHANNELS)[None, :],
            other=0.0,
        )
        total = tl.dot(gathered, matrix, total, input_precision=PRECISION)
    tl.store(
        out + rows.to(tl.int64)[:, None] * OUT_CHANNELS + d[None, :],
        total.to(out.dtype.element_ty),
        mask=in_rows[:, None] & (d < OUT_CHANNELS)[None, :],
    )


@triton.jit(do_not_specialize=["num_outputs", "rows_per_program"])
@no_type_check
def _weight_gradient_kernel(
    x,
    grad,
    sources,
    partial,
    num_outputs,
    rows_per_program,
    NUM_OFFSETS: tl.constexpr,
    IN_CHANNELS: tl.constexpr,
    OUT_CHANNELS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A tile [BLOCK_D, BLOCK_C] of one offset's matrix, summed over one range of the output rows."""
    k = tl.program_id(0)
    split = tl.program_id(1)
    tiles_c: tl.constexpr = (IN_CHANNELS + BLOCK_C - 1) // BLOCK_C
    d = tl.program_id(2) // tiles_c * BLOCK_D + tl.arange(0, BLOCK_D)
    c = tl.program_id(2) % tiles_c * BLOCK_C + tl.arange(0, BLOCK_C)
    begin = split * rows_per_program
    end = min(begin + rows_per_program, num_outputs)
    total = tl.zeros((BLOCK_D, BLOCK_C), tl.float32)
    for first in range(begin, end, BLOCK_M):
        rows = first + tl.arange(0, BLOCK_M)
        source = tl.load(sources + k * num_outputs + rows, mask=rows < end, other=-1)
        upstream = tl.load(
            grad + rows.to(tl.int64)[:, None] * OUT_CHANNELS + d[None, :],
            mask=(rows < end)[:, None] & (d < OUT_CHANNELS)[None, :],
            other=0.0,
        )
        gathered = tl.load(
            x + source.to(tl.int64)[:, None] * IN_CHANNELS + c[None, :],
            mask=(source >= 0)[:, None] & (c < IN_CHANNELS)[None, :],
            other=0.0,
        )
        total = tl.dot(tl.trans(upstream), gathered, total, input_precision=PRECISION)
    offset = split.to(tl.int64) * (OUT_CHANNELS * NUM_OFFSETS * IN_CHANNELS)
    tl.store(
        partial + offset + (d[:, None] * NUM_OFFSETS + k) * IN_CHANNELS + c[None, :],
        total,
        mask=(d < OUT_CHANNELS)[:, None] & (c < IN_CHANNELS)[None, :],
    )
