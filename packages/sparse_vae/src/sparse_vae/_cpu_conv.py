"""Convolution on the CPU: gather the rows that meet at an offset, multiply, add to the output rows.

Arithmetic bounds it, so only the pairs that exist are multiplied. What the rest costs is traffic: a tile of output rows
goes through all offsets before the next one starts, so that its rows, their neighbours and two buffers stay in cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

BLOCK = 1024
"""Tiles consist of whole blocks of this many output rows."""

TILE_BYTES = 2**21
"""Size of a tile's input or output rows, whichever is wider. Smaller tiles make products too small to be fast."""


@dataclass(frozen=True)
class RowPairs:
    """The pairs of rows that meet at every offset, output rows ascending.

    Attributes:
        rows: for every offset int64 (input rows, output rows), of one length. `index_add_` is much slower on int32.
        cuts: for every offset where in `rows` the blocks of output rows start, and the length.
        num_outputs: output rows of the map.
        identity: offset that carries every row to itself, if there is one.
    """

    rows: tuple[tuple[Tensor, Tensor], ...]
    cuts: tuple[tuple[int, ...], ...]
    num_outputs: int
    identity: int | None

    @classmethod
    def build(cls, sources: Int[Tensor, "K M"], num_inputs: int, identity: int | None) -> RowPairs:
        """Pairs of a `KernelMap`, see there for the arguments."""
        num_outputs = sources.shape[1]
        starts = torch.arange(0, num_outputs + BLOCK, BLOCK)
        rows, cuts = [], []
        for inputs in sources:
            outputs = (inputs < num_inputs).nonzero().squeeze(1)
            rows.append((inputs[outputs], outputs))
            cuts.append(tuple(torch.searchsorted(outputs, starts).tolist()))
        return cls(tuple(rows), tuple(cuts), num_outputs, identity)

    def tile_rows(self, row_bytes: int) -> int:
        """Output rows of a tile: whole blocks, about `TILE_BYTES` but at least two blocks, all tiles about equal."""
        num_blocks = -(-self.num_outputs // BLOCK)
        num_tiles = max(1, round(num_blocks / max(2, TILE_BYTES // (BLOCK * row_bytes))))
        return BLOCK * -(-num_blocks // num_tiles)

    def tiles(self, tile_rows: int) -> Iterator[tuple[slice, list[tuple[int, Tensor, Tensor]]]]:
        """For one tile after another its output rows and, offset by offset, (offset, input rows, output rows).

        The identity offset is left out: its input rows are the output rows.
        """
        step = tile_rows // BLOCK
        for first in range(0, -(-self.num_outputs // BLOCK), max(1, step)):
            pieces = []
            for k, (rows, cuts) in enumerate(zip(self.rows, self.cuts, strict=True)):
                begin, end = cuts[first], cuts[min(first + step, len(cuts) - 1)]
                if end > begin and k != self.identity:
                    pieces.append((k, rows[0][begin:end], rows[1][begin:end]))
            yield slice(first * BLOCK, (first + step) * BLOCK), pieces


def forward(x: Float[Tensor, "N C"], weight: Float[Tensor, "D K C"], pairs: RowPairs) -> Float[Tensor, "M D"]:
    """`out[i] = sum_k weight[:, k] @ x[sources[k, i]]`, summed in the order of the offsets, the identity first."""
    shape = (pairs.num_outputs, weight.shape[0])
    out = x.new_zeros(shape) if pairs.identity is None else x.new_empty(shape)
    matrices = [matrix.T for matrix in weight.unbind(1)]
    tile_rows = pairs.tile_rows(x.element_size() * max(x.shape[1], weight.shape[0]))
    gathered, products = (x.new_empty(min(tile_rows, len(out)), width) for width in (x.shape[1], weight.shape[0]))
    for rows, pieces in pairs.tiles(tile_rows):
        if pairs.identity is not None:
            torch.mm(x[rows], matrices[pairs.identity], out=out[rows])
        for k, inputs, outputs in pieces:
            neighbours, product = gathered[: len(inputs)], products[: len(inputs)]
            torch.index_select(x, 0, inputs, out=neighbours)
            torch.mm(neighbours, matrices[k], out=product)
            out.index_add_(0, outputs, product)
    return out


def weight_gradient(x: Float[Tensor, "N C"], grad: Float[Tensor, "M D"], pairs: RowPairs) -> Float[Tensor, "D K C"]:
    """`sum_i grad[i] x[sources[k, i]]^T` for every offset k, in float32 or better."""
    # Tiles add up in float32: their number, and so the rounding, must not matter.
    dtype = torch.promote_types(x.dtype, torch.float32)
    total = x.new_zeros(grad.shape[1], len(pairs.rows), x.shape[1], dtype=dtype)
    matrices = total.unbind(1)
    tile_rows = pairs.tile_rows(x.element_size() * max(x.shape[1], grad.shape[1]))
    buffers = [rows.new_empty(min(tile_rows, len(grad)), rows.shape[1]) for rows in (x, grad)]
    for rows, pieces in pairs.tiles(tile_rows):
        if pairs.identity is not None:
            _add_product(matrices[pairs.identity], grad[rows].T, x[rows])
        for k, inputs, outputs in pieces:
            neighbours, gradients = (buffer[: len(inputs)] for buffer in buffers)
            torch.index_select(x, 0, inputs, out=neighbours)
            torch.index_select(grad, 0, outputs, out=gradients)
            _add_product(matrices[k], gradients.T, neighbours)
    return total


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    if total.dtype == a.dtype:
        torch.addmm(total, a, b, out=total)
    else:
        total += a @ b
