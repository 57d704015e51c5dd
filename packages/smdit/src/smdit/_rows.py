"""Packed rows of several objects, and how values of an object reach all of its rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


class _Spread(torch.autograd.Function):
    """`values[index]` for rows that lie together: the backward sums segments in order, without atomics or sorting."""

    @staticmethod
    def forward(ctx, values, index, lengths):
        ctx.save_for_backward(lengths)
        return values.index_select(0, index)

    @staticmethod
    def backward(ctx, grad):
        (lengths,) = ctx.saved_tensors
        return torch.segment_reduce(grad.contiguous(), "sum", lengths=lengths, axis=0, unsafe=True), None, None


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows of B objects packed one object after the other.

    Attributes:
        lengths: rows of every object.
        index: int64 [R], the object of every row.
        counts: int64 [B], `lengths` on the device.
    """

    lengths: tuple[int, ...]
    index: Int[Tensor, " R"]
    counts: Int[Tensor, " B"]

    @classmethod
    def from_lengths(cls, lengths: Sequence[int], device: torch.device | str | None = None) -> Rows:
        """Rows of objects with the given numbers of rows."""
        counts = torch.tensor(list(lengths), dtype=torch.int64)
        index = torch.repeat_interleave(torch.arange(len(counts)), counts)
        return cls(tuple(lengths), index.to(device), counts.to(device))

    def spread(self, values: Float[Tensor, "B C"]) -> Float[Tensor, "_ C"]:
        """The value of every row's object, [R, C]; a single object's value stays [1, C] and broadcasts."""
        if len(self.lengths) == 1:
            return values
        if len(set(self.lengths)) == 1:
            return values[:, None].expand(-1, self.lengths[0], -1).flatten(0, 1)
        return _Spread.apply(values, self.index, self.counts)
