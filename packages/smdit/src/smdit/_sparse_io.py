"""Sparse-convolutional levels before and after a trunk: voxels to tokens and back, with skips between them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

from jaxtyping import Float
from sparse_vae import (
    LayerNorm32,
    SparseConv3d,
    SparseDownConv3d,
    SparseTensor,
    SparseUpConv3d,
    Topology,
    downsample,
    upsample,
)
from torch import Tensor, nn

from smdit._modulation import Modulation, affine_norm, modulated_norm
from smdit._rows import Rows

Pooling = Literal["conv", "mean", "trellis"]


def voxel_rows(topology: Topology) -> Rows:
    """Rows of a topology's objects, kept with the topology."""
    return topology.memo("smdit.rows", lambda: Rows.from_lengths(topology.lengths, topology.device))


class SparseResBlock(nn.Module):
    """Two submanifold convolutions with a skip, modulated by time (TRELLIS's SparseResBlock3d).

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        embedding_channels: channels of the time embedding.
        resample: "down" pools over 2x2x2 regions first, "up" copies to the active children first.
        pooling: mode of `sparse_vae.downsample`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        embedding_channels: int,
        *,
        resample: Literal["down", "up"] | None = None,
        pooling: Literal["mean", "trellis"] = "mean",
    ) -> None:
        super().__init__()
        self.resample, self.pooling = resample, pooling
        self.norm1 = LayerNorm32(in_channels, eps=1e-6)
        self.norm2 = LayerNorm32(out_channels, eps=1e-6, elementwise_affine=False)
        self.conv1 = SparseConv3d(in_channels, out_channels)
        self.conv2 = SparseConv3d(out_channels, out_channels)
        self.modulation = Modulation(embedding_channels, 2, out_channels)
        self.skip = nn.Linear(in_channels, out_channels) if in_channels != out_channels else nn.Identity()

    def reset_parameters(self) -> None:
        """Start as the skip alone."""
        for parameter in self.conv2.parameters():
            nn.init.zeros_(parameter)

    def forward(
        self, x: SparseTensor, embedding: Float[Tensor, "B E"], topology: Topology | None = None
    ) -> SparseTensor:
        """The block's output; `topology` is the level to return to, needed by "up" alone."""
        if self.resample == "down":
            x = downsample(x, mode=self.pooling)
        h = x.replace(affine_norm(x.features, self.norm1, voxel_rows(x.topology), silu=True))
        skip = x.replace(self.skip(x.features))
        if self.resample == "up":  # what acts on single voxels has acted on the coarse ones, which are fewer
            assert topology is not None
            h, skip = upsample(h, topology), upsample(skip, topology)
        rows = voxel_rows(h.topology)
        scale, shift = self.modulation(embedding).chunk(2, dim=-1)
        features = modulated_norm(self.conv1(h).features, shift, scale, rows, self.norm2.eps, silu=True)
        features = self.conv2(h.replace(features)).features
        return h.replace((skip.features + features).to(x.dtype))


class SparseEncoder(nn.Module):
    """Latents -> tokens of the trunk: a linear layer, then for every level residual blocks and a step down.

    With no levels it is the linear layer alone.
    """

    def __init__(
        self, in_channels: int, width: int, io_channels: Sequence[int], num_blocks: int, pooling: Pooling
    ) -> None:
        super().__init__()
        levels = (*io_channels, width)
        self.input = nn.Linear(in_channels, levels[0])
        self.blocks = nn.ModuleList()
        for channels, wider in pairwise(levels):
            self.blocks.extend(SparseResBlock(channels, channels, width) for _ in range(num_blocks - 1))
            if pooling == "conv":
                self.blocks.append(SparseDownConv3d(channels, wider))
            else:
                self.blocks.append(SparseResBlock(channels, wider, width, resample="down", pooling=pooling))

    def prepare(self, topology: Topology) -> Topology:
        """Derive the levels of a topology and what their blocks read from it; returns the tokens' one."""
        for block in self.blocks:
            voxel_rows(topology)
            if isinstance(block, SparseDownConv3d):
                topology = topology.coarser().topology
                continue
            assert isinstance(block, SparseResBlock)
            topology = topology.coarser().topology if block.resample == "down" else topology
            topology.neighbours(block.conv1.kernel_size)
        voxel_rows(topology)
        return topology

    def forward(self, x: SparseTensor, embedding: Float[Tensor, "B E"]) -> tuple[SparseTensor, list[SparseTensor]]:
        """Tokens, and the output of every block for the decoder's skips."""
        dtype = self.input.weight.dtype
        h = x.replace(self.input(x.features.to(dtype)).to(dtype))
        outputs = []
        for block in self.blocks:
            h = block(h, embedding) if isinstance(block, SparseResBlock) else block(h)
            h = h.replace(h.features.to(dtype))  # under autocast the residual stream stays in the weights' dtype
            outputs.append(h)
        return h, outputs


class SparseDecoder(nn.Module):
    """Tokens of the trunk -> features of the finest level, the mirror of `SparseEncoder`.

    Every residual block also sees the output of the encoder block that it mirrors. A transposed convolution ("conv")
    does not: what it would add is the input of the trunk, which the trunk's residual stream carries already.
    """

    def __init__(
        self, width: int, io_channels: Sequence[int], num_blocks: int, pooling: Pooling, use_skip: bool = True
    ) -> None:
        super().__init__()
        self.use_skip = use_skip
        factor = 2 if use_skip else 1
        levels = (*io_channels, width)
        self.out_channels = levels[0]
        self.blocks = nn.ModuleList()
        for channels, wider in reversed(list(pairwise(levels))):
            if pooling == "conv":
                self.blocks.append(SparseUpConv3d(wider, channels))
            else:
                self.blocks.append(SparseResBlock(factor * wider, channels, width, resample="up"))
            self.blocks.extend(SparseResBlock(factor * channels, channels, width) for _ in range(num_blocks - 1))

    def forward(
        self, h: SparseTensor, outputs: Sequence[SparseTensor], embedding: Float[Tensor, "B E"], finest: Topology
    ) -> SparseTensor:
        """Features on the finest level.

        Args:
            h: tokens after the trunk.
            outputs: the encoder's second result.
            embedding: time embedding.
            finest: topology of the encoder's input.
        """
        dtype = h.dtype
        # The level that block i of the encoder started from is where its mirror returns to.
        starts = [finest, *(output.topology for output in outputs)]
        for block, skip, start in zip(self.blocks, reversed(outputs), reversed(starts[:-1]), strict=True):
            if isinstance(block, SparseUpConv3d):
                h = block(h, start)
            else:
                h = SparseTensor.cat([h, skip]) if self.use_skip else h
                h = block(h, embedding, start)
            h = h.replace(h.features.to(dtype))
        return h
