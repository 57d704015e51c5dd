"""Attention over packed segments, with one signature for several kernels."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from sparse_vae._layout import AttentionLayout
from sparse_vae._triton_probe import triton_failure

_HALF = (torch.float16, torch.bfloat16)
SHORT = 1024
"""Keys of the longest segment up to which the Triton kernel is chosen; longer ones belong to kernels that pipeline."""
_preferred: ContextVar[str | None] = ContextVar("attention_backend", default=None)


def attention(
    q: Float[Tensor, "N H D"],
    k: Float[Tensor, "M H D"],
    v: Float[Tensor, "M H D"],
    layout: AttentionLayout,
    backend: str | None = None,
) -> Float[Tensor, "N H D"]:
    """Softmax attention inside the segments of a layout, scaled by 1 / sqrt(D).

    Args:
        q: queries, packed over all segments, in the row order of the features (the layout permutes where needed).
        k: keys; M = N for self-attention.
        v: values.
        layout: which rows see which.
        backend: "naive", "sdpa", "varlen", "triton" (no gradients) or "xformers". By default the one of the enclosing
            `attention_backend` context, else the fastest that is available for the tensors and the layout.

    Returns:
        [N, H, D] in the row order and dtype of `q`.

    Raises:
        ValueError: shapes that do not fit the layout, or an unknown backend.
        RuntimeError: the backend asked for is not available; the message says why.
    """
    _check(q, k, v, layout)
    chosen = _resolve(q, layout, backend)
    if len(q) == 0:
        return v.new_empty(q.shape)
    if layout.order is None:
        return chosen.run(q, k, v, layout)
    q, k, v = (layout.to_segments(rows) for rows in (q, k, v))
    return layout.from_segments(chosen.run(q, k, v, layout.segment_major))


@dataclass(frozen=True)
class AttentionBackend:
    """A kernel for packed attention.

    Attributes:
        name: what `attention(backend=...)` calls it.
        run: (q, k, v, layout) -> output, all segment-major.
        is_available: (device, dtype, head_dim) -> None, or the reason why it cannot be used.
    """

    name: str
    run: Callable[[Tensor, Tensor, Tensor, AttentionLayout], Tensor]
    is_available: Callable[[torch.device, torch.dtype, int], str | None]


@contextmanager
def attention_backend(name: str | None) -> Iterator[None]:
    """Prefer a backend for every `attention` call inside the block that names none itself.

    Code that PyTorch compiles does not see the preference; an argument or a config it does.
    """
    if name is not None:
        _find(name)
    token = _preferred.set(name)
    try:
        yield
    finally:
        _preferred.reset(token)


def attention_backends(
    device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, head_dim: int = 64
) -> dict[str, str | None]:
    """All backends, and for each None if it can be used with such tensors or the reason why not."""
    device = torch.device(device)
    return {backend.name: backend.is_available(device, dtype, head_dim) for backend in _BACKENDS}


def _resolve(q: Tensor, layout: AttentionLayout, name: str | None) -> AttentionBackend:
    if name is None and not torch.compiler.is_compiling():  # which cannot follow context variables
        name = _preferred.get()
    if name is not None:
        backend = _find(name)
        reason = backend.is_available(q.device, q.dtype, q.shape[-1])
        if reason is not None:
            raise RuntimeError(f"attention backend {name!r} is not available: {reason}")
        return backend
    if _suits_triton(q, layout):
        return _find("triton")
    # Equal segments are an ordinary batch, for which the dense kernels are faster than the packed ones.
    if layout.is_uniform or _varlen_reason(q.device, q.dtype, q.shape[-1]) is not None:
        return _find("sdpa")
    return _find("varlen")


def _suits_triton(q: Tensor, layout: AttentionLayout) -> bool:
    """Whether segments are short and nobody asks for gradients or for a graph of PyTorch's own operations."""
    if not q.is_cuda or layout.is_uniform or layout.max_key_length > SHORT or torch.compiler.is_compiling():
        return False
    if torch.is_grad_enabled() and q.requires_grad:
        return False
    return _triton_reason(q.device, q.dtype, q.shape[-1]) is None


def _find(name: str) -> AttentionBackend:
    for backend in _BACKENDS:
        if backend.name == name:
            return backend
    raise ValueError(f"no attention backend {name!r}: choose one of {', '.join(b.name for b in _BACKENDS)}")


def _check(q: Tensor, k: Tensor, v: Tensor, layout: AttentionLayout) -> None:
    if q.ndim != 3 or k.shape != v.shape or q.shape[1:] != k.shape[1:]:
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}: expected [N, H, D], [M, H, D], [M, H, D]"
        )
    if len(q) != layout.num_rows or len(k) != layout.num_key_rows:
        raise ValueError(
            f"{len(q)} queries and {len(k)} keys for a layout of {layout.num_rows} and {layout.num_key_rows} rows"
        )


def _naive(q: Tensor, k: Tensor, v: Tensor, layout: AttentionLayout) -> Tensor:
    """One segment at a time, softmax in float32 or better: the oracle of the others."""
    precise = torch.promote_types(q.dtype, torch.float32)
    outputs = []
    # Autocast would quietly turn the products below back to half precision.
    with torch.autocast(q.device.type, enabled=False):
        segments = zip(
            q.to(precise).split(layout.lengths),
            k.to(precise).split(layout.key_lengths),
            v.to(precise).split(layout.key_lengths),
            strict=True,
        )
        for queries, keys, values in segments:
            logits = torch.einsum("nhd,mhd->hnm", queries, keys) / math.sqrt(q.shape[-1])
            outputs.append(torch.einsum("hnm,mhd->nhd", logits.softmax(dim=-1), values))
    return torch.cat(outputs).to(q.dtype)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, layout: AttentionLayout) -> Tensor:
    """PyTorch's dense kernels over buckets of similar segments."""
    padding = layout.padding
    q, k, v = padding.pad_queries(q), padding.pad_keys(k), padding.pad_keys(v)
    query_sizes = [bucket.num_segments * bucket.length for bucket in padding.buckets]
    key_sizes = [bucket.num_segments * bucket.key_length for bucket in padding.buckets]
    outputs = []
    for bucket, queries, keys, values in zip(
        padding.buckets, q.split(query_sizes), k.split(key_sizes), v.split(key_sizes), strict=True
    ):
        if len(queries) == 0:
            continue
        batch = [rows.unflatten(0, (bucket.num_segments, -1)).transpose(1, 2) for rows in (queries, keys, values)]
        output = F.scaled_dot_product_attention(batch[0], batch[1], batch[2], attn_mask=bucket.key_mask)
        outputs.append(output.transpose(1, 2).flatten(0, 1))
    return padding.unpad(torch.cat(outputs) if len(outputs) > 1 else outputs[0])


def _varlen(q: Tensor, k: Tensor, v: Tensor, layout: AttentionLayout) -> Tensor:
    """PyTorch's packed flash attention. Only the arguments common to all releases that have it are passed."""
    from torch.nn.attention.varlen import varlen_attn

    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        # Some releases give the kernels' raw strides to the backward; contiguous rows are right for all of them.
        q, k, v = (rows.contiguous() for rows in (q, k, v))
    lengths = layout.offsets, layout.key_offsets, layout.max_length, layout.max_key_length
    return cast(Tensor, varlen_attn(q, k, v, *lengths))


def _xformers(q: Tensor, k: Tensor, v: Tensor, layout: AttentionLayout) -> Tensor:
    from xformers.ops import memory_efficient_attention
    from xformers.ops.fmha import BlockDiagonalMask

    mask = BlockDiagonalMask.from_seqlens(list(layout.lengths), list(layout.key_lengths), device=q.device)
    return memory_efficient_attention(q[None], k[None], v[None], attn_bias=mask)[0]


def _triton(q: Tensor, k: Tensor, v: Tensor, layout: AttentionLayout) -> Tensor:
    from sparse_vae import _triton_attention  # not at the top: it imports Triton

    return _triton_attention.attention(q, k, v, layout)


def _triton_reason(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    if device.type != "cuda" or dtype not in _HALF:
        return f"it needs float16 or bfloat16 on CUDA, got {dtype} on {device.type}"
    if head_dim > 128:
        return f"it needs a head dimension of at most 128, got {head_dim}"
    return triton_failure(device)


def _always(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    return None


@cache
def _varlen_import_error() -> str | None:
    try:
        from torch.nn.attention.varlen import varlen_attn  # noqa: F401
    except ImportError:
        return f"torch {torch.__version__} has no torch.nn.attention.varlen (2.10 and later do)"
    return None


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def _varlen_reason(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    if device.type != "cuda" or dtype not in _HALF:
        return f"it needs float16 or bfloat16 on CUDA, got {dtype} on {device.type}"
    if torch.version.hip is not None or _capability(device) < (8, 0):
        return "it needs an NVIDIA GPU of compute capability 8.0 or later"
    if head_dim % 8 or head_dim > 256:
        return f"it needs a head dimension that is a multiple of 8 up to 256, got {head_dim}"
    return _varlen_import_error()


@cache
def _xformers_import_error() -> str | None:
    try:
        from xformers.ops import memory_efficient_attention  # noqa: F401
    except ImportError as error:
        return f"xformers cannot be imported ({error}): install it for this torch release"
    return None


def _xformers_reason(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    if device.type != "cuda":
        return f"it needs CUDA, got {device.type}"
    return _xformers_import_error()


_BACKENDS = (
    AttentionBackend("triton", _triton, _triton_reason),
    AttentionBackend("varlen", _varlen, _varlen_reason),
    AttentionBackend("sdpa", _sdpa, _always),
    AttentionBackend("xformers", _xformers, _xformers_reason),
    AttentionBackend("naive", _naive, _always),
)
