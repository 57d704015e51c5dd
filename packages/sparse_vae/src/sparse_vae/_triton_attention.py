"""Attention inside short segments in Triton: one program for 64 queries of a segment and a head.

Forward only. Windows hold tens to hundreds of voxels, for which kernels made for long sequences are launched with more
work on the host and more padding on the device than there are products. Imported only where it is used, since it
imports Triton.
"""

from __future__ import annotations

import math
from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_vae._layout import QUERY_TILE, AttentionLayout


def attention(q: Tensor, k: Tensor, v: Tensor, layout: AttentionLayout) -> Tensor:
    """[N, H, D] segment-major queries, keys and values -> [N, H, D]; softmax and sums are float32."""
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        raise RuntimeError("attention backend 'triton' has no gradient: train with 'varlen' or 'sdpa'")
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    num_heads, head_dim = q.shape[1:]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    tiles = layout.query_tiles
    if len(tiles):
        with torch.cuda.device_of(q):
            _kernel[(len(tiles), num_heads)](
                q, k, v, out, tiles, math.log2(math.e) / math.sqrt(head_dim), num_heads,
                q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1),
                DIM=head_dim, BLOCK_DIM=max(16, triton.next_power_of_2(head_dim)), BLOCK=QUERY_TILE, num_warps=4,
                num_stages=2,
            )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["num_heads"])
@no_type_check  # keeps checkers of annotations at run time away from functions that never run as Python
def _kernel(
    q, k, v, out, tiles, scale, num_heads, q_row, q_head, k_row, k_head, v_row, v_head,
    DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    tile = tiles + tl.program_id(0) * 4
    head = tl.program_id(1)
    queries, last_query = tl.load(tile), tl.load(tile + 1)
    keys, last_key = tl.load(tile + 2), tl.load(tile + 3)
    row = queries + tl.arange(0, BLOCK)
    d = tl.arange(0, BLOCK_DIM)
    present = (row < last_query)[:, None] & (d < DIM)[None, :]
    query = tl.load(q + row.to(tl.int64)[:, None] * q_row + head * q_head + d[None, :], mask=present, other=0.0)
    highest = tl.full((BLOCK,), -1e30, tl.float32)
    weight = tl.zeros((BLOCK,), tl.float32)
    total = tl.zeros((BLOCK, BLOCK_DIM), tl.float32)
    for first in range(keys, last_key, BLOCK):
        column = first + tl.arange(0, BLOCK)
        known = (column < last_key)[:, None] & (d < DIM)[None, :]
        place = column.to(tl.int64)[:, None]
        key = tl.load(k + place * k_row + head * k_head + d[None, :], mask=known, other=0.0)
        value = tl.load(v + place * v_row + head * v_head + d[None, :], mask=known, other=0.0)
        logits = tl.dot(query, tl.trans(key)) * scale
        logits = tl.where((column < last_key)[None, :], logits, -1e30)
        higher = tl.maximum(highest, tl.max(logits, axis=1))
        share = tl.exp2(logits - higher[:, None])
        decay = tl.exp2(highest - higher)
        weight = weight * decay + tl.sum(share, axis=1)
        total = tl.dot(share.to(value.dtype), value, total * decay[:, None])
        highest = higher
    total = total / weight[:, None]
    place = (row.to(tl.int64) * num_heads + head)[:, None] * DIM
    tl.store(out + place + d[None, :], total.to(out.dtype.element_ty), mask=present)
