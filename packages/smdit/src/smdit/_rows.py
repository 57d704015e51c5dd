"""Packed rows of several objects, and how values of an object reach all of its rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

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
class Pieces:
    """Rows cut into runs of limited length, each within one object, for sums over the rows of every object.

    Attributes:
        object: int32 [P], the object of every run.
        begin: int32 [P], its first row.
        end: int32 [P], one after its last row.
        counts: int64 [B], runs of every object.
    """

    object: Int[Tensor, " P"]
    begin: Int[Tensor, " P"]
    end: Int[Tensor, " P"]
    counts: Int[Tensor, " B"]

    def sum(self, partial: Float[Tensor, "P k C"]) -> Float[Tensor, "B k C"]:
        """Sums over the runs of every object, in order."""
        if len(self.counts) == 1:
            return partial.sum(dim=0, keepdim=True)
        return torch.segment_reduce(partial, "sum", lengths=self.counts, axis=0, unsafe=True, initial=0)


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
        if len(lengths) == 1:  # filled where it is needed: a copy would wait for the device
            index = torch.zeros(lengths[0], dtype=torch.int64, device=device)
            return cls(tuple(lengths), index, torch.full((1,), lengths[0], dtype=torch.int64, device=device))
        counts = torch.tensor(list(lengths), dtype=torch.int64)
        index = torch.repeat_interleave(torch.arange(len(counts)), counts)
        return cls(tuple(lengths), index.to(device), counts.to(device))

    def pieces(self, length: int) -> Pieces:
        """The rows in runs of at most `length`, made once for every length."""
        if length not in self._pieces:
            total = sum(-(-n // length) for n in self.lengths)  # known here, so that the device is not waited for
            counts = (self.counts + length - 1) // length
            objects = torch.arange(len(self.lengths), device=self.index.device)
            owner = torch.repeat_interleave(objects, counts, output_size=total)
            ends = self.counts.cumsum(0)
            within = torch.arange(total, device=self.index.device) - (counts.cumsum(0) - counts)[owner]
            begin = (ends - self.counts)[owner] + within * length
            end = torch.minimum(begin + length, ends[owner])
            self._pieces[length] = Pieces(owner.int(), begin.int(), end.int(), counts)
        return self._pieces[length]

    @cached_property
    def _pieces(self) -> dict[int, Pieces]:
        return {}

    @cached_property
    def begins(self) -> Int[Tensor, " B+1"]:
        """int32, the first row of every object, and at the end the number of rows."""
        return torch.nn.functional.pad(self.counts.cumsum(0), (1, 0)).int()

    @cached_property
    def as_one(self) -> Rows:
        """The same rows as those of a single object."""
        return self if len(self.lengths) == 1 else Rows.from_lengths([sum(self.lengths)], self.index.device)

    @cached_property
    def is_uniform(self) -> bool:
        """Whether all objects have one number of rows."""
        return len(set(self.lengths)) == 1

    def spread(self, values: Float[Tensor, "B C"]) -> Float[Tensor, "_ C"]:
        """The value of every row's object, [R, C]; a single object's value stays [1, C] and broadcasts."""
        if len(self.lengths) == 1:
            return values
        if self.is_uniform:
            return values[:, None].expand(-1, self.lengths[0], -1).flatten(0, 1)
        return _Spread.apply(values, self.index, self.counts)
