"""How packed rows form attention segments, and how segments are padded where a kernel needs rectangles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Int, Shaped
from torch import Tensor

MAX_PADDING = 0.10
"""A padded bucket holds at most this share of extra rows (relative to its real rows)."""
QUERY_TILE = 64
"""Query rows that a program of the Triton kernel handles."""


class _Permute(torch.autograd.Function):
    """`x[order]` whose backward gathers with the inverse permutation instead of scattering with atomics."""

    @staticmethod
    def forward(ctx, x, order, inverse):
        ctx.save_for_backward(order, inverse)
        return x.index_select(0, order)

    @staticmethod
    def backward(ctx, grad):
        order, inverse = ctx.saved_tensors
        return _Permute.apply(grad, inverse, order), None, None


def permute(x: Tensor, order: Tensor | None, inverse: Tensor | None) -> Tensor:
    """`x[order]`, differentiable; `inverse` is the inverse permutation."""
    if torch.is_grad_enabled() and x.requires_grad:
        return _Permute.apply(x, order, inverse)
    return x.index_select(0, order)  # type: ignore[arg-type]


class _Gather(torch.autograd.Function):
    """`x[rows]`, where only the entries listed in `used` ever receive a gradient, each from one row of `x`.

    That makes both directions plain gathers and copies: no atomics, so gradients are reproducible.
    """

    @staticmethod
    def forward(ctx, x, rows, used):
        ctx.save_for_backward(used)
        return x.index_select(0, rows)

    @staticmethod
    def backward(ctx, grad):
        return grad.index_select(0, *ctx.saved_tensors), None, None


@dataclass(frozen=True)
class Bucket:
    """Segments of similar length, padded to one rectangle.

    Attributes:
        num_segments: rectangles in the bucket.
        length: padded number of query rows a segment.
        key_length: padded number of key rows a segment.
        key_mask: bool [num_segments, 1, 1, key_length], True for real keys; None where nothing is padded.
    """

    num_segments: int
    length: int
    key_length: int
    key_mask: Tensor | None


@dataclass(frozen=True)
class Padding:
    """Row tables that move packed rows into buckets and back. `None` tables mean: the rows are in place already.

    Attributes:
        buckets: the rectangles, in the order in which their rows follow each other in the padded arrangement.
        query_rows: int64 [P], packed query row of every padded query row (padding repeats its segment's first row).
        key_rows: int64 [Pk], the same for keys and values.
        query_unpad: int64 [N], padded row of every packed query row.
        key_unpad: int64 [M], padded row of every packed key row.
    """

    buckets: tuple[Bucket, ...]
    query_rows: Tensor | None = None
    key_rows: Tensor | None = None
    query_unpad: Tensor | None = None
    key_unpad: Tensor | None = None

    @property
    def num_rows(self) -> int:
        """Padded query rows over all buckets."""
        return sum(bucket.num_segments * bucket.length for bucket in self.buckets)

    def pad_queries(self, q: Tensor) -> Tensor:
        """Packed queries to padded ones; their padding must not receive a gradient."""
        return q if self.query_rows is None else _Gather.apply(q, self.query_rows, self.query_unpad)

    def pad_keys(self, k: Tensor) -> Tensor:
        """Packed keys or values to padded ones; their padding must be masked."""
        return k if self.key_rows is None else _Gather.apply(k, self.key_rows, self.key_unpad)

    def unpad(self, x: Tensor) -> Tensor:
        """Padded query rows back to packed ones."""
        return x if self.query_unpad is None else x.index_select(0, self.query_unpad)


@dataclass(frozen=True, eq=False)
class AttentionLayout:
    """Segments of packed rows: a query row attends to exactly the key rows of its own segment.

    Build it with `from_lengths`; `Topology.windows` makes the layouts of windowed attention.

    Attributes:
        lengths: query rows of every segment; their sum is N.
        key_lengths: key rows of every segment (the same tuple for self-attention).
        offsets: int32 [S + 1] on the device, cumulative `lengths` ("cu_seqlens").
        key_offsets: int32 [S + 1] on the device, cumulative `key_lengths`.
        order: int64 [N] or None. Row i of the segment-major arrangement is row `order[i]` of the features; None when
            the features are segment-major already.
        inverse: int64 [N] or None, the inverse permutation.
    """

    lengths: tuple[int, ...]
    key_lengths: tuple[int, ...]
    offsets: Int[Tensor, " S_plus_1"]
    key_offsets: Int[Tensor, " S_plus_1"]
    order: Int[Tensor, " N"] | None = None
    inverse: Int[Tensor, " N"] | None = None

    @classmethod
    def from_lengths(
        cls,
        lengths: Sequence[int],
        device: torch.device | str | None = None,
        *,
        key_lengths: Sequence[int] | None = None,
        order: Int[Tensor, " N"] | None = None,
    ) -> AttentionLayout:
        """Layout of consecutive segments.

        Args:
            lengths: query rows of every segment, in the order of the segment-major rows. Zero is allowed.
            device: device of the tables.
            key_lengths: key rows of every segment when they differ from the queries' (cross-attention).
            order: permutation that makes the features segment-major (`features[order]`), None when they are already.
                Only self-attention takes one.

        Raises:
            ValueError: lengths that are negative or do not match each other, or queries without any key.
        """
        queries = tuple(int(n) for n in lengths)
        keys = queries if key_lengths is None else tuple(int(n) for n in key_lengths)
        if len(queries) != len(keys):
            raise ValueError(
                f"{len(queries)} segments of queries but {len(keys)} of keys: give one key length a segment"
            )
        if min((*queries, *keys), default=0) < 0:
            raise ValueError("segment lengths must not be negative")
        if any(n > 0 and m == 0 for n, m in zip(queries, keys, strict=True)):
            raise ValueError("a segment with queries has no key to attend to: every such segment needs a key")
        if order is not None and key_lengths is not None:
            raise ValueError("order permutes queries and keys alike, so it cannot be combined with key_lengths")
        if order is not None and order.shape != (sum(queries),):
            raise ValueError(f"order has shape {tuple(order.shape)}, expected ({sum(queries)},): one entry a row")
        offsets = _offsets(queries, device)
        inverse = None
        if order is not None:
            inverse = torch.empty_like(order)
            inverse[order] = torch.arange(len(order), device=order.device, dtype=order.dtype)
        key_offsets = offsets if key_lengths is None else _offsets(keys, device)
        return cls(queries, keys, offsets, key_offsets, order, inverse)

    @property
    def num_segments(self) -> int:
        return len(self.lengths)

    @cached_property
    def num_rows(self) -> int:
        """N, the number of packed query rows."""
        return sum(self.lengths)

    @cached_property
    def num_key_rows(self) -> int:
        """The number of packed key rows."""
        return self.num_rows if self.key_lengths is self.lengths else sum(self.key_lengths)

    @cached_property
    def max_length(self) -> int:
        return max((0, *self.lengths))

    @cached_property
    def max_key_length(self) -> int:
        return max((0, *self.key_lengths))

    @cached_property
    def is_uniform(self) -> bool:
        """Whether all segments have one length, so that packed rows are a batch without padding."""
        return len(set(self.lengths)) <= 1 and len(set(self.key_lengths)) <= 1

    @cached_property
    def segment_major(self) -> AttentionLayout:
        """The same segments for features that have gone through `to_segments`."""
        if self.order is None:
            return self
        return AttentionLayout(self.lengths, self.key_lengths, self.offsets, self.key_offsets)

    def to_segments(self, x: Shaped[Tensor, "N ..."]) -> Shaped[Tensor, "N ..."]:
        """Rows of `x` in segment-major order; differentiable."""
        return x if self.order is None else permute(x, self.order, self.inverse)

    def from_segments(self, x: Shaped[Tensor, "N ..."]) -> Shaped[Tensor, "N ..."]:
        """Undo `to_segments`; differentiable."""
        return x if self.order is None else permute(x, self.inverse, self.order)

    @cached_property
    @torch.inference_mode(False)
    def query_tiles(self) -> Int[Tensor, "T 4"]:
        """int32 (first query row, end of the queries, first key row, end of the keys) of every `QUERY_TILE` queries."""
        lengths, keys = (np.asarray(rows, dtype=np.int64) for rows in (self.lengths, self.key_lengths))
        counts = -(-lengths // QUERY_TILE)
        segment = np.repeat(np.arange(len(lengths)), counts)
        within = np.arange(len(segment)) - np.repeat(np.cumsum(counts) - counts, counts)
        ends, key_ends = np.cumsum(lengths), np.cumsum(keys)
        columns = (
            (ends - lengths)[segment] + within * QUERY_TILE,
            ends[segment],
            (key_ends - keys)[segment],
            key_ends[segment],
        )
        return torch.from_numpy(np.stack(columns, axis=1).astype(np.int32)).to(self.offsets.device)

    def after(self, previous: AttentionLayout) -> tuple[Int[Tensor, " N"], Int[Tensor, " N"]] | None:
        """The permutation, and its inverse, that brings rows from the order of `previous` into that of this layout.

        Both layouts are of the same features. None where the orders are the same.
        """
        if self is previous or (self.order is None and previous.order is None):
            return None
        if self.order is None or self.inverse is None:
            return previous.inverse, previous.order  # type: ignore[return-value]
        if previous.order is None or previous.inverse is None:
            return self.order, self.inverse
        return previous.inverse[self.order], self.inverse[previous.order]

    @cached_property
    @torch.inference_mode(False)  # the first use may be a sampler's, a later one in training
    def padding(self) -> Padding:
        """Buckets of similar segments for kernels that need rectangles, with at most `MAX_PADDING` extra rows each."""
        if self.is_uniform:
            segments = self.num_segments if self.max_length else 0
            return Padding((Bucket(segments, self.max_length, self.max_key_length, None),))
        return _pad(np.asarray(self.lengths), np.asarray(self.key_lengths), self.offsets.device)


def _offsets(lengths: tuple[int, ...], device: torch.device | str | None) -> Tensor:
    return torch.from_numpy(np.cumsum((0, *lengths), dtype=np.int32)).to(device)


def _pad(lengths: np.ndarray, key_lengths: np.ndarray, device: torch.device) -> Padding:
    starts, key_starts = np.cumsum(lengths) - lengths, np.cumsum(key_lengths) - key_lengths
    by_length = np.lexsort((lengths, key_lengths))[::-1]
    by_length = by_length[key_lengths[by_length] > 0]
    buckets, query_tables, key_tables = [], [], []
    for members in _similar(by_length, lengths, key_lengths):
        query_tables.append(_rectangle(starts[members], lengths[members], lengths.sum()))
        key_tables.append(_rectangle(key_starts[members], key_lengths[members], key_lengths.sum()))
        valid = key_tables[-1][1]
        mask = None if valid.all() else torch.from_numpy(valid)[:, None, None].to(device)
        buckets.append(Bucket(len(members), query_tables[-1][0].shape[1], valid.shape[1], mask))
    tables = (*_tables(query_tables), *_tables(key_tables))
    query_rows, query_unpad, key_rows, key_unpad = (torch.from_numpy(table).to(device) for table in tables)
    return Padding(tuple(buckets), query_rows, key_rows, query_unpad, key_unpad)


def _tables(rectangles: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Packed row of every padded row, and padded row of every packed row, over all buckets."""
    rows = np.concatenate([rows.ravel() for rows, _ in rectangles])
    valid = np.concatenate([valid.ravel() for _, valid in rectangles])
    unpad = np.empty(valid.sum(), dtype=np.int64)
    unpad[rows[valid]] = np.flatnonzero(valid)
    return rows, unpad


def _similar(by_length: np.ndarray, lengths: np.ndarray, key_lengths: np.ndarray) -> list[np.ndarray]:
    """Cut segments, sorted by length, into runs that stay within the padding budget for queries and for keys."""
    cuts = []
    longest = rows = longest_key = keys = count = 0
    for position, segment in enumerate(by_length):
        n, m = int(lengths[segment]), int(key_lengths[segment])
        longest, longest_key = max(longest, n), max(longest_key, m)
        count, rows, keys = count + 1, rows + n, keys + m
        budget = 1 + MAX_PADDING
        if count > 1 and (longest * count > budget * rows or longest_key * count > budget * keys):
            cuts.append(position)
            longest, rows, longest_key, keys, count = n, n, m, m, 1
    return np.split(by_length, cuts)


def _rectangle(starts: np.ndarray, lengths: np.ndarray, num_rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers [S, max length] of segments, padded with each segment's first row, and which of them are real."""
    steps = np.arange(lengths.max())
    valid = steps < lengths[:, None]
    first = np.minimum(starts, max(num_rows - 1, 0))
    return first[:, None] + np.where(valid, steps, 0), valid
