"""Double-stream and single-stream blocks over packed tokens (the layout of FLUX, numerically equal to it)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Num
from marope import AxialRoPE, RotaryTable, norm_rotary
from sparse_vae import AttentionLayout, MultiHeadRMSNorm, attention
from torch import Tensor, nn

from smdit._modulation import Modulation, ModulationBias, gated, modulated_norm
from smdit._rows import Rows


@dataclass(frozen=True, eq=False)
class JointTokens:
    """How image and voxel tokens of a batch are packed: all that blocks need besides features.

    Streams hold all image rows, then all voxel rows, each object-major; the joint sequence is object-major, with an
    object's image tokens before its voxel tokens.

    Attributes:
        image: rows of the image stream.
        voxel: rows of the voxel stream.
        joint: rows of the joint sequence.
        layout: attention inside an object; its `order` leads from streams to the joint sequence.
        image_table: rotary table of the image stream, None for attention without rotary positions.
        voxel_table: of the voxel stream.
        joint_table: the same rows in the order of the joint sequence.
    """

    image: Rows
    voxel: Rows
    joint: Rows
    layout: AttentionLayout
    image_table: RotaryTable | None = None
    voxel_table: RotaryTable | None = None
    joint_table: RotaryTable | None = None

    @classmethod
    def build(
        cls,
        voxel_lengths: list[int],
        num_image_tokens: int,
        device: torch.device | str | None = None,
        rope: AxialRoPE | None = None,
        image_positions: Num[Tensor, "T axes"] | None = None,
        voxel_positions: Num[Tensor, "N axes"] | None = None,
    ) -> JointTokens:
        """Packing of a batch.

        Args:
            voxel_lengths: voxel tokens of every object.
            num_image_tokens: image tokens of every object, the same for all.
            device: where the tables live.
            rope: rotary embedding; None leaves positions out.
            image_positions: positions of the image tokens, shared by all objects.
            voxel_positions: positions of all voxel tokens, object-major.
        """
        batch_size, num_voxels = len(voxel_lengths), sum(voxel_lengths)
        image = Rows.from_lengths([num_image_tokens] * batch_size, device)
        voxel = Rows.from_lengths(voxel_lengths, device)
        joint = Rows.from_lengths([num_image_tokens + n for n in voxel_lengths], device)
        order = None
        if batch_size > 1:  # stable: within an object image rows come first, and rows keep their order
            order = torch.argsort(torch.cat([image.index, voxel.index]), stable=True)
        layout = AttentionLayout.from_lengths(joint.lengths, device, order=order)
        if rope is None:
            return cls(image, voxel, joint, layout)
        if image_positions is None or voxel_positions is None or len(voxel_positions) != num_voxels:
            raise ValueError(f"rope needs image_positions and the positions of all {num_voxels} voxel tokens")
        stream = rope.table(torch.cat([image_positions.repeat(batch_size, 1), voxel_positions.to(image_positions)]))
        ordered = RotaryTable(*(layout.to_segments(part) for part in stream))
        for_image, for_voxel = (
            RotaryTable(*parts)
            for parts in zip(*(p.split([batch_size * num_image_tokens, num_voxels]) for p in stream), strict=True)
        )
        return cls(image, voxel, joint, layout, for_image, for_voxel, ordered)

    def join(self, image: Tensor, voxel: Tensor) -> Tensor:
        """Rows of both streams in the order of the joint sequence."""
        if not self.layout.is_uniform:
            return self.layout.to_segments(torch.cat([image, voxel]))
        batch_size = len(self.joint.lengths)
        return torch.cat([rows.unflatten(0, (batch_size, -1)) for rows in (image, voxel)], dim=1).flatten(0, 1)

    def part(self, joint: Tensor) -> tuple[Tensor, Tensor]:
        """The opposite of `join`."""
        counts = sum(self.image.lengths), sum(self.voxel.lengths)
        if not self.layout.is_uniform:
            image, voxel = self.layout.from_segments(joint).split(counts)
            return image, voxel
        batch_size = len(self.joint.lengths)
        parts = joint.unflatten(0, (batch_size, -1)).split([count // batch_size for count in counts], dim=1)
        return parts[0].flatten(0, 1), parts[1].flatten(0, 1)


class RMSNorm(nn.Module):
    """Weight of the root-mean-square norm over a head's channels, shared by all heads; `norm_rotary` applies it."""

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps


def position_heads(
    q: Float[Tensor, "R H D"],
    k: Float[Tensor, "R H D"],
    q_norm: nn.Module,
    k_norm: nn.Module,
    rope: AxialRoPE | None,
    table: RotaryTable | None,
) -> tuple[Float[Tensor, "R H D"], Float[Tensor, "R H D"]]:
    """Queries and keys normalised, unless the norms are identities, then rotated, where there is a rotary embedding."""
    if rope is None:
        table = None
    if isinstance(q_norm, nn.Identity):
        return (q, k) if rope is None or table is None else rope.rotate(q, k, table)
    (q_weight, eps), (k_weight, _) = _norm_options(q_norm), _norm_options(k_norm)
    return norm_rotary(q, k, table, q_weight, k_weight, eps=eps, interleaved=rope is None or rope.interleaved)


def _norm_options(norm: nn.Module) -> tuple[Tensor, float]:
    """Weight and epsilon of a norm over a head's channels, as `norm_rotary` takes them."""
    if isinstance(norm, MultiHeadRMSNorm):  # it divides by the norm, at least 1e-12: next to no epsilon
        return norm.gamma, 1e-24
    assert isinstance(norm, RMSNorm)
    return norm.weight, norm.eps


def mlp(width: int, ratio: float) -> nn.Sequential:
    """Linear, tanh-GELU, linear."""
    hidden = int(width * ratio)
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU(approximate="tanh"), nn.Linear(hidden, width))


def _modulation(width: int, count: int, shared: bool) -> nn.Module:
    return ModulationBias(width, count) if shared else Modulation(width, count)


class Stream(nn.Module):
    """The weights of one modality in a double-stream block."""

    def __init__(self, width: int, num_heads: int, mlp_ratio: float, qk_norm: bool, shared_modulation: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        head_dim = width // num_heads
        self.modulation = _modulation(width, 6, shared_modulation)
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm = RMSNorm(head_dim) if qk_norm else nn.Identity()
        self.k_norm = RMSNorm(head_dim) if qk_norm else nn.Identity()
        self.out = nn.Linear(width, width)
        self.mlp = mlp(width, mlp_ratio)

    def project(
        self,
        x: Tensor,
        modulation: tuple[Tensor, ...],
        rows: Rows,
        rope: AxialRoPE | None,
        table: RotaryTable | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values [R, H, D] of the rows; `modulation` starts with shift and scale."""
        shift, scale = modulation[:2]
        qkv = self.qkv(modulated_norm(x, shift, scale, rows))
        q, k, v = qkv.unflatten(-1, (3, self.num_heads, -1)).unbind(1)
        return *position_heads(q, k, self.q_norm, self.k_norm, rope, table), v

    def update(self, x: Tensor, attended: Tensor, modulation: tuple[Tensor, ...], rows: Rows) -> Tensor:
        """Residual updates by the attention output and the MLP; `modulation` = gate, then shift, scale, gate."""
        gate, mlp_shift, mlp_scale, mlp_gate = modulation
        x = gated(x, self.out(attended), gate, rows)
        return gated(x, self.mlp(modulated_norm(x, mlp_shift, mlp_scale, rows)), mlp_gate, rows)


class DoubleStreamBlock(nn.Module):
    """Image and voxel tokens with own weights, attending jointly (Diff2to3 section 3.2; FLUX's DoubleStreamBlock).

    Args:
        width: channels of both streams.
        num_heads: attention heads of `width / num_heads` channels.
        mlp_ratio: hidden channels of the MLPs over `width`.
        qk_norm: RMS normalisation of queries and keys, before the rotation.
        shared_modulation: take modulations that the model has projected already, and add a bias.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qk_norm: bool = True,
        shared_modulation: bool = False,
    ) -> None:
        super().__init__()
        self.image = Stream(width, num_heads, mlp_ratio, qk_norm, shared_modulation)
        self.voxel = Stream(width, num_heads, mlp_ratio, qk_norm, shared_modulation)

    def forward(
        self,
        image: Float[Tensor, "I C"],
        voxel: Float[Tensor, "N C"],
        modulation: tuple[Float[Tensor, "B M"], Float[Tensor, "B M"]],
        tokens: JointTokens,
        rope: AxialRoPE | None = None,
    ) -> tuple[Float[Tensor, "I C"], Float[Tensor, "N C"]]:
        """Both streams after the block.

        Args:
            image: rows of the image stream.
            voxel: rows of the voxel stream.
            modulation: for image and voxel: the time embedding [B, width], or with `shared_modulation` the projected
                modulation [B, 6 width].
            tokens: packing of the batch.
            rope: how the tables of `tokens` rotate; None without rotary positions.
        """
        for_image = self.image.modulation(modulation[0]).chunk(6, dim=-1)
        for_voxel = self.voxel.modulation(modulation[1]).chunk(6, dim=-1)
        from_image = self.image.project(image, for_image, tokens.image, rope, tokens.image_table)
        from_voxel = self.voxel.project(voxel, for_voxel, tokens.voxel, rope, tokens.voxel_table)
        q, k, v = (tokens.join(*pair) for pair in zip(from_image, from_voxel, strict=True))
        attended = tokens.part(attention(q, k, v, tokens.layout.segment_major).flatten(-2))
        return (
            self.image.update(image, attended[0], for_image[2:], tokens.image),
            self.voxel.update(voxel, attended[1], for_voxel[2:], tokens.voxel),
        )


class SingleStreamBlock(nn.Module):
    """Attention and MLP side by side over the joint sequence (Diff2to3 section 3.2; FLUX's SingleStreamBlock).

    Arguments as in `DoubleStreamBlock`.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qk_norm: bool = True,
        shared_modulation: bool = False,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        head_dim, hidden = width // num_heads, int(width * mlp_ratio)
        self.sizes = (3 * width, hidden)
        self.modulation = _modulation(width, 3, shared_modulation)
        self.expand = nn.Linear(width, 3 * width + hidden)
        self.q_norm = RMSNorm(head_dim) if qk_norm else nn.Identity()
        self.k_norm = RMSNorm(head_dim) if qk_norm else nn.Identity()
        self.contract = nn.Linear(width + hidden, width)

    def forward(
        self,
        x: Float[Tensor, "R C"],
        modulation: Float[Tensor, "B M"],
        tokens: JointTokens,
        rope: AxialRoPE | None = None,
    ) -> Float[Tensor, "R C"]:
        """Joint sequence after the block; `modulation` is [B, width], or with `shared_modulation` [B, 3 width]."""
        shift, scale, gate = self.modulation(modulation).chunk(3, dim=-1)
        qkv, hidden = self._expand(modulated_norm(x, shift, scale, tokens.joint))
        q, k, v = qkv.unflatten(-1, (3, self.num_heads, -1)).unbind(1)
        q, k = position_heads(q, k, self.q_norm, self.k_norm, rope, tokens.joint_table)
        attended = attention(q, k, v, tokens.layout.segment_major).flatten(-2)
        return gated(x, self._contract(attended, F.gelu(hidden, approximate="tanh")), gate, tokens.joint)

    def _expand(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Both parts of `expand`, as rows without gaps: what follows would read a part of longer rows slowly."""
        weights, biases = self.expand.weight.split(self.sizes), self.expand.bias.split(self.sizes)
        return F.linear(x, weights[0], biases[0]), F.linear(x, weights[1], biases[1])

    def _contract(self, attended: Tensor, hidden: Tensor) -> Tensor:
        """`contract` of the concatenation, which is not built: it would be the largest tensor of the block."""
        weight = self.contract.weight.split([attended.shape[-1], hidden.shape[-1]], dim=1)
        return torch.addmm(F.linear(hidden, weight[1], self.contract.bias), attended, weight[0].T)
