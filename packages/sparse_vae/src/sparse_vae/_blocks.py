"""Layers of the sparse transformer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from sparse_vae._attention import attention
from sparse_vae._layout import AttentionLayout
from sparse_vae._topology import Topology


class LayerNorm32(nn.LayerNorm):
    """LayerNorm over the last axis, computed in float32 and returned in the dtype of its input."""

    def forward(self, x: Float[Tensor, "... C"]) -> Float[Tensor, "... C"]:
        if self.weight is None and not torch.is_autocast_enabled(x.device.type):
            return F.layer_norm(x, self.normalized_shape, eps=self.eps)  # float32 inside, whatever the dtype of x
        weight, bias = (None if p is None else p.float() for p in (self.weight, self.bias))
        return F.layer_norm(x.float(), self.normalized_shape, weight, bias, self.eps).to(x.dtype)


class MultiHeadRMSNorm(nn.Module):
    """Unit-norm heads times sqrt(head_dim) and a learned factor per head and channel (TRELLIS attention/modules.py).

    Args:
        head_dim: channels of a head.
        num_heads: heads.
    """

    def __init__(self, head_dim: int, num_heads: int):
        super().__init__()
        self.scale = head_dim**0.5
        self.gamma = nn.Parameter(torch.ones(num_heads, head_dim))

    def forward(self, x: Float[Tensor, "... H D"]) -> Float[Tensor, "... H D"]:
        return (F.normalize(x.float(), dim=-1) * self.gamma.float() * self.scale).to(x.dtype)


class AbsolutePositionEmbedding(nn.Module):
    """Sine and cosine features of integer coordinates (TRELLIS transformer/blocks.py).

    Each of the three axes gets `channels // 6` frequencies 10000^(-i/n), as [sin, cos]; the axes follow each other and
    the remaining channels are zero. No parameters.

    Args:
        channels: channels of the embedding, at least 6.
    """

    def __init__(self, channels: int):
        super().__init__()
        if channels < 6:
            raise ValueError(f"channels is {channels}: three axes of sine and cosine need at least 6")
        self.channels = channels

    def forward(self, coords: Int[Tensor, "N 3"]) -> Float[Tensor, "N C"]:
        """Coordinates (x, y, z) in voxels -> float32 embedding."""
        count = self.channels // 6
        powers = torch.arange(count, dtype=torch.float32, device=coords.device) / count
        angles = coords.float()[:, :, None] / 10000.0**powers
        embedding = torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(1)
        return F.pad(embedding, (0, self.channels - embedding.shape[1]))

    def of(self, topology: Topology) -> Float[Tensor, "N C"]:
        """The embedding of a topology's voxels, computed once per topology."""
        return topology.memo(("absolute_positions", self.channels), lambda: self(topology.coords[:, 1:]))


class SelfAttention(nn.Module):
    """Multi-head attention inside the segments of a layout.

    Args:
        width: channels.
        num_heads: heads; divides the width.
        qk_norm: normalise queries and keys with `MultiHeadRMSNorm`.
        backend: see `attention`.
    """

    def __init__(self, width: int, num_heads: int, *, qk_norm: bool = False, backend: str | None = None):
        super().__init__()
        self.num_heads, self.backend = num_heads, backend
        self.qkv = nn.Linear(width, 3 * width)
        self.query_norm = MultiHeadRMSNorm(width // num_heads, num_heads) if qk_norm else nn.Identity()
        self.key_norm = MultiHeadRMSNorm(width // num_heads, num_heads) if qk_norm else nn.Identity()
        self.out = nn.Linear(width, width)

    def forward(self, x: Float[Tensor, "N C"], layout: AttentionLayout) -> Float[Tensor, "N C"]:
        # Permuting C channels before the projection is cheaper than 3 C after it.
        qkv = self.qkv(layout.to_segments(x))
        q, k, v = qkv.view(len(qkv), 3, self.num_heads, x.shape[1] // self.num_heads).unbind(dim=1)
        h = attention(self.query_norm(q), self.key_norm(k), v, layout.segment_major, self.backend)
        return layout.from_segments(self.out(h.flatten(1)))


class TransformerBlock(nn.Module):
    """Pre-norm attention and MLP (TRELLIS sparse/transformer/blocks.py); norms without affine, eps 1e-6.

    Args:
        width: channels.
        num_heads: heads; divides the width.
        mlp_ratio: hidden width of the MLP over `width`.
        qk_norm: normalise queries and keys.
        backend: attention backend.
    """

    def __init__(
        self, width: int, num_heads: int, mlp_ratio: float = 4.0, *, qk_norm: bool = False, backend: str | None = None
    ):
        super().__init__()
        hidden = int(width * mlp_ratio)
        self.norm1 = LayerNorm32(width, eps=1e-6, elementwise_affine=False)
        self.attention = SelfAttention(width, num_heads, qk_norm=qk_norm, backend=backend)
        self.norm2 = LayerNorm32(width, eps=1e-6, elementwise_affine=False)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(approximate="tanh"), nn.Linear(hidden, width))

    def forward(self, x: Float[Tensor, "N C"], layout: AttentionLayout) -> Float[Tensor, "N C"]:
        x = x + self.attention(self.norm1(x), layout)
        return x + self.mlp(self.norm2(x))
