"""Convolution over a kernel map in Triton: gathers, multiplies and adds up in one kernel, without a gathered copy.

Imported only where it is used, since it imports Triton. No kernel is specialised on a number of rows or of channels, so
that nothing is compiled again when the next batch has other voxels or the next layer another width.
"""

from typing import NamedTuple, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from sparse_vae._kernel_map import KernelMap
from sparse_vae._tile_plan import TILE

PROGRAMS = 512
"""Programs that a weight gradient is split into, a few for every multiprocessor of a large GPU."""
SUM_BLOCK = 1024
"""Elements that a program adds up over the groups of offsets."""
PARTIAL_BUDGET = 2**26
"""Bytes that the partial sums of a weight gradient may take (one sum always fits)."""


class Tiles(NamedTuple):
    """Shape of the matrix product that one program forms, and how the compiler arranges it."""

    rows: int
    out: int
    inner: int
    num_warps: int
    num_stages: int

    @property
    def launch(self) -> dict[str, int]:
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


def output_tiles(out_channels: int, in_channels: int, itemsize: int) -> Tiles:
    """Tiles of `forward`: output rows x output channels, over input channels. `rows` divides `TILE`."""
    if itemsize > 2:
        return Tiles(64, _block(out_channels, 64), _block(in_channels, 32), 4, 3)
    out = _block(out_channels, 256)
    return Tiles(64, out, _block(in_channels, 64), 8 if out == 256 else 4, 4)


def gradient_tiles(out_channels: int, in_channels: int, itemsize: int) -> Tiles:
    """Tiles of `weight_gradient`: output channels x input channels, over pairs of rows."""
    if itemsize > 2:
        return Tiles(_block(out_channels, 64), _block(in_channels, 64), 32, 4, 3)
    rows, out = _block(out_channels, 128), _block(in_channels, 128)
    return Tiles(rows, out, 64, 8 if rows * out > 64 * 128 else 4, 3)


def forward(x: Float[Tensor, "N C"], weight: Float[Tensor, "D K C"], kernel_map: KernelMap) -> Float[Tensor, "M D"]:
    """`out[i] = sum_k weight[:, k] @ x[sources[k, i]]`, added up in float32; the weight may have any strides."""
    out_channels, num_offsets, in_channels = weight.shape
    num_outputs = kernel_map.num_outputs
    out = x.new_empty(num_outputs, out_channels)
    if out.numel() == 0 or x.numel() == 0:
        return out.zero_()
    plan = kernel_map.tile_plan
    groups = len(plan.order)
    partial = out if groups == 1 else x.new_empty(groups, num_outputs, out_channels, dtype=torch.float32)
    tiles = output_tiles(out_channels, in_channels, x.element_size())
    grid = (triton.cdiv(num_outputs, tiles.rows), triton.cdiv(out_channels, tiles.out), groups)
    with torch.cuda.device_of(x):
        _forward_kernel[grid](
            x.contiguous(),
            weight,
            plan.order,
            plan.sources,
            plan.tile_offsets,
            plan.tile_counts,
            partial,
            num_outputs,
            in_channels,
            out_channels,
            *weight.stride(),
            OFFSETS_PER_GROUP=num_offsets // groups,
            TILE=TILE,
            BLOCK_M=tiles.rows,
            BLOCK_D=tiles.out,
            BLOCK_C=tiles.inner,
            EVEN_C=in_channels % tiles.inner == 0,
            PRECISION=_precision(x),
            **tiles.launch,
        )
    if groups > 1:
        add_up(partial, out)
    return out


def add_up(partial: Float[Tensor, "G *rest"], out: Float[Tensor, " *rest"]) -> None:
    """`out = partial.sum(0)` for contiguous tensors, rounded once."""
    with torch.cuda.device_of(out):
        _sum_kernel[(triton.cdiv(out.numel(), SUM_BLOCK),)](partial, out, out.numel(), len(partial), BLOCK=SUM_BLOCK)


def weight_gradient(x: Float[Tensor, "N C"], grad: Float[Tensor, "M D"], kernel_map: KernelMap) -> Tensor:
    """float32 [D, K, C]: `sum_i outer(grad[i], x[sources[k, i]])`, with sums in an order that depends on M alone."""
    num_offsets, num_outputs = kernel_map.sources.shape
    in_channels, out_channels = x.shape[1], grad.shape[1]
    shape = (out_channels, num_offsets, in_channels)
    if grad.numel() == 0 or x.numel() == 0:
        return x.new_zeros(shape, dtype=torch.float32)
    plan = kernel_map.pair_plan
    tiles = gradient_tiles(out_channels, in_channels, x.element_size())
    num_tiles = triton.cdiv(out_channels, tiles.rows) * triton.cdiv(in_channels, tiles.out)
    splits = min(
        triton.cdiv(PROGRAMS, num_offsets * num_tiles),
        triton.cdiv(num_outputs, 4 * tiles.inner),
        max(1, PARTIAL_BUDGET // (4 * out_channels * num_offsets * in_channels)),
    )
    partial = x.new_empty(splits, *shape, dtype=torch.float32)
    with torch.cuda.device_of(x):
        _weight_gradient_kernel[(num_tiles, splits, num_offsets)](
            x.contiguous(),
            grad.contiguous(),
            plan.sources,
            plan.outputs,
            plan.counts,
            partial,
            num_outputs,
            in_channels,
            out_channels,
            NUM_OFFSETS=num_offsets,
            BLOCK_D=tiles.rows,
            BLOCK_C=tiles.out,
            BLOCK_M=tiles.inner,
            PRECISION=_precision(x),
            **tiles.launch,
        )
    return partial[0] if splits == 1 else partial.sum(dim=0)


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
    order,
    sources,
    tile_offsets,
    tile_counts,
    out,
    num_outputs,
    in_channels,
    out_channels,
    stride_d,
    stride_k,
    stride_c,
    OFFSETS_PER_GROUP: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_C: tl.constexpr,
    EVEN_C: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A tile of outputs [BLOCK_M, BLOCK_D] of one group of offsets; `out` is [groups, M, D]."""
    group = tl.program_id(2)
    place = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = place < num_outputs
    tile = group * ((num_outputs + TILE - 1) // TILE) + tl.program_id(0) * BLOCK_M // TILE
    tile_offsets += tile * OFFSETS_PER_GROUP
    steps = (in_channels + BLOCK_C - 1) // BLOCK_C
    total = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    # One flat loop over (offset, channels), which the compiler can pipeline.
    number = 0
    first = 0
    for _ in range(tl.load(tile_counts + tile) * steps):
        k = tl.load(tile_offsets + number).to(tl.int64)
        c = first + tl.arange(0, BLOCK_C)
        source = tl.load(sources + k * num_outputs + place, mask=inside, other=-1)
        present = (source >= 0)[:, None]
        known = (d < out_channels)[None, :]
        if not EVEN_C:
            present = present & (c < in_channels)[None, :]
            known = known & (c < in_channels)[:, None]
        gathered = tl.load(x + source.to(tl.int64)[:, None] * in_channels + c[None, :], mask=present, other=0.0)
        matrix = tl.load(weight + k * stride_k + c[:, None] * stride_c + d[None, :] * stride_d, mask=known, other=0.0)
        total = tl.dot(gathered, matrix, total, input_precision=PRECISION)
        first += BLOCK_C
        wrap = first >= in_channels
        number = tl.where(wrap, number + 1, number)
        first = tl.where(wrap, 0, first)
    rows = group * num_outputs + tl.load(order + group * num_outputs + place, mask=inside, other=0)
    tl.store(
        out + rows.to(tl.int64)[:, None] * out_channels + d[None, :],
        total.to(out.dtype.element_ty),
        mask=inside[:, None] & (d < out_channels)[None, :],
    )


@triton.jit(do_not_specialize=["count", "groups"])
@no_type_check
def _sum_kernel(partial, out, count, groups, BLOCK: tl.constexpr):
    """out[i] = sum of partial[g, i]."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for group in range(groups):
        total += tl.load(partial + group * count.to(tl.int64) + i, mask=i < count, other=0.0)
    tl.store(out + i, total.to(out.dtype.element_ty), mask=i < count)


@triton.jit(do_not_specialize=["num_outputs"])
@no_type_check
def _weight_gradient_kernel(
    x,
    grad,
    sources,
    outputs,
    counts,
    partial,
    num_outputs,
    in_channels,
    out_channels,
    NUM_OFFSETS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_M: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A tile [BLOCK_D, BLOCK_C] of one offset's matrix, summed over one share of the offset's pairs of rows."""
    k = tl.program_id(2)
    split = tl.program_id(1)
    tiles_c = (in_channels + BLOCK_C - 1) // BLOCK_C
    d = tl.program_id(0) // tiles_c * BLOCK_D + tl.arange(0, BLOCK_D)
    c = tl.program_id(0) % tiles_c * BLOCK_C + tl.arange(0, BLOCK_C)
    count = tl.load(counts + k)
    blocks = (count + BLOCK_M - 1) // BLOCK_M
    share = (blocks + tl.num_programs(1) - 1) // tl.num_programs(1) * BLOCK_M
    begin = split * share
    end = min(begin + share, count)
    sources += k.to(tl.int64) * num_outputs
    outputs += k.to(tl.int64) * num_outputs
    total = tl.zeros((BLOCK_D, BLOCK_C), tl.float32)
    for first in range(begin, end, BLOCK_M):
        pair = first + tl.arange(0, BLOCK_M)
        source = tl.load(sources + pair, mask=pair < end, other=0)
        output = tl.load(outputs + pair, mask=pair < end, other=0)
        upstream = tl.load(
            grad + output.to(tl.int64)[:, None] * out_channels + d[None, :],
            mask=(pair < end)[:, None] & (d < out_channels)[None, :],
            other=0.0,
        )
        gathered = tl.load(
            x + source.to(tl.int64)[:, None] * in_channels + c[None, :],
            mask=(pair < end)[:, None] & (c < in_channels)[None, :],
            other=0.0,
        )
        total = tl.dot(tl.trans(upstream), gathered, total, input_precision=PRECISION)
    start = split.to(tl.int64) * NUM_OFFSETS * out_channels * in_channels
    tl.store(
        partial + start + (d.to(tl.int64)[:, None] * NUM_OFFSETS + k) * in_channels + c[None, :],
        total,
        mask=(d < out_channels)[:, None] & (c < in_channels)[None, :],
    )
