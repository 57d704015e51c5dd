"""The block of the cross-attention baselines: self-attention, cross-attention to the condition, MLP."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from marope import AxialRoPE, RotaryTable
from sparse_vae import AttentionLayout, LayerNorm32, MultiHeadRMSNorm, attention
from torch import Tensor, nn

from smdit._blocks import mlp, position_heads
from smdit._modulation import Modulation, ModulationBias, affine_norm, gated, modulated_norm
from smdit._rows import Rows


@dataclass(frozen=True, eq=False)
class CrossTokens:
    """How the tokens of a batch are packed, for the cross-attention block.

    Attributes:
        rows: tokens of every object.
        layout: attention of an object's tokens to each other.
        cross: attention of an object's tokens to its condition tokens.
        table: rotary table of the tokens, or None.
    """

    rows: Rows
    layout: AttentionLayout
    cross: AttentionLayout
    table: RotaryTable | None = None

    @classmethod
    def build(
        cls,
        lengths: list[int],
        num_condition_tokens: int,
        device: torch.device | str | None = None,
        table: RotaryTable | None = None,
    ) -> CrossTokens:
        """Packing of objects with the given numbers of tokens, each with as many condition tokens."""
        conditions = [num_condition_tokens] * len(lengths)
        return cls(
            Rows.from_lengths(lengths, device),
            AttentionLayout.from_lengths(lengths, device),
            AttentionLayout.from_lengths(lengths, device, key_lengths=conditions),
            table,
        )


class SelfAttention(nn.Module):
    """Self-attention of packed tokens with TRELLIS's per-head RMS norms, then rotary positions, if any."""

    def __init__(self, width: int, num_heads: int, qk_norm: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm, self.k_norm = _head_norms(width, num_heads, qk_norm)
        self.out = nn.Linear(width, width)

    def forward(self, x: Float[Tensor, "R C"], tokens: CrossTokens, rope: AxialRoPE | None) -> Float[Tensor, "R C"]:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(1)
        q, k = position_heads(q, k, self.q_norm, self.k_norm, rope, tokens.table)
        return self.out(attention(q, k, v, tokens.layout).flatten(-2))


class CrossAttention(nn.Module):
    """Attention of packed tokens to the condition tokens of their object."""

    def __init__(self, width: int, condition_channels: int, num_heads: int, qk_norm: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(condition_channels, 2 * width)
        self.q_norm, self.k_norm = _head_norms(width, num_heads, qk_norm)
        self.out = nn.Linear(width, width)

    def forward(
        self, x: Float[Tensor, "R C"], condition: Float[Tensor, "S K"], tokens: CrossTokens
    ) -> Float[Tensor, "R C"]:
        q = self.q(x).unflatten(-1, (self.num_heads, -1))
        k, v = self.kv(condition).unflatten(-1, (2, self.num_heads, -1)).unbind(1)
        return self.out(attention(self.q_norm(q), self.k_norm(k), v, tokens.cross).flatten(-2))


class CrossBlock(nn.Module):
    """Modulated self-attention, plain cross-attention, modulated MLP (TRELLIS's ModulatedTransformerCrossBlock).

    Args:
        width: channels of the tokens.
        condition_channels: channels of the condition tokens.
        num_heads: attention heads.
        mlp_ratio: hidden channels of the MLP over `width`.
        qk_norm: normalise queries and keys of the self-attention.
        qk_norm_cross: of the cross-attention.
        shared_modulation: take a modulation that the model has projected already, and add a bias of zero or more.
    """

    def __init__(
        self,
        width: int,
        condition_channels: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qk_norm: bool = False,
        qk_norm_cross: bool = False,
        shared_modulation: bool = False,
    ) -> None:
        super().__init__()
        self.modulation = ModulationBias(width, 6) if shared_modulation else Modulation(width, 6)
        self.self_attention = SelfAttention(width, num_heads, qk_norm)
        self.cross_norm = LayerNorm32(width, eps=1e-6)
        self.cross_attention = CrossAttention(width, condition_channels, num_heads, qk_norm_cross)
        self.mlp = mlp(width, mlp_ratio)

    def forward(
        self,
        x: Float[Tensor, "R C"],
        modulation: Float[Tensor, "B M"],
        condition: Float[Tensor, "S K"],
        tokens: CrossTokens,
        rope: AxialRoPE | None = None,
    ) -> Float[Tensor, "R C"]:
        """Tokens after the block.

        Args:
            x: packed tokens.
            modulation: time embedding [B, width], or with `shared_modulation` the projected modulation [B, 6 width].
            condition: packed condition tokens, object-major.
            tokens: packing of the batch.
            rope: how `tokens.table` rotates.
        """
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = self.modulation(modulation).chunk(6, dim=-1)
        attended = self.self_attention(modulated_norm(x, shift, scale, tokens.rows), tokens, rope)
        x = gated(x, attended, gate, tokens.rows)
        x = (x + self.cross_attention(affine_norm(x, self.cross_norm, tokens.rows), condition, tokens)).to(x.dtype)
        return gated(x, self.mlp(modulated_norm(x, mlp_shift, mlp_scale, tokens.rows)), mlp_gate, tokens.rows)


def _head_norms(width: int, num_heads: int, enabled: bool) -> tuple[nn.Module, nn.Module]:
    if not enabled:
        return nn.Identity(), nn.Identity()
    return MultiHeadRMSNorm(width // num_heads, num_heads), MultiHeadRMSNorm(width // num_heads, num_heads)
