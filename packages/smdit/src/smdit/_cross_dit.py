"""The cross-attention baseline on voxels: TRELLIS's SLAT flow (trellis/models/structured_latent_flow.py)."""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float
from marope import AxialRoPE, equal_axes
from sparse_vae import SparseTensor, Topology
from torch import Tensor, nn

from smdit._config import CrossDiTConfig
from smdit._cross_blocks import CrossBlock, CrossTokens
from smdit._embedding import TimeEmbedding, flatten_condition, position_condition, sincos_embedding
from smdit._init import check_input, initialise
from smdit._modulation import Modulation
from smdit._sparse_io import SparseDecoder, SparseEncoder


class CrossDiT(nn.Module):
    """Velocity of noisy voxel latents, given condition tokens by cross-attention.

    Args:
        config: sizes and options; `CrossDiTConfig.preset(name)` gives known ones.
    """

    capturable = True  # see EulerSampler.capture

    def __init__(self, config: CrossDiTConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        head_dim = width // config.num_heads
        self.rope = AxialRoPE(head_dim, equal_axes(head_dim)) if config.position == "rotary" else None
        self.time = TimeEmbedding(width)
        io = (config.io_channels, config.num_io_blocks, config.io_pooling)
        self.encoder = SparseEncoder(config.latent_channels, width, *io)
        self.shared_modulation = Modulation(width, 6) if config.shared_modulation else None
        self.blocks = nn.ModuleList(
            CrossBlock(
                width,
                config.condition_channels,
                config.num_heads,
                config.mlp_ratio,
                config.qk_norm,
                config.qk_norm_cross,
                config.shared_modulation,
            )
            for _ in range(config.num_blocks)
        )
        self.decoder = SparseDecoder(width, *io, use_skip=config.use_skip)
        self.output = nn.Linear(self.decoder.out_channels, config.latent_channels)
        initialise(self)
        nn.init.zeros_(self.output.weight)

    def forward(self, x: SparseTensor, t: Float[Tensor, " B"], condition: Float[Tensor, "B *tokens K"]) -> SparseTensor:
        """Velocity of `x` at time `t`.

        Args:
            x: noisy latents [N, latent_channels] of B objects.
            t: flow time of every object in [0, 1]; 1 is noise.
            condition: [B, tokens, condition_channels] or [B, images, rows, columns, condition_channels]; zeros for
                the unconditional velocity.
        """
        config = self.config
        check_input(x, t, config.latent_channels, config.grid_size)
        tokens, shape = flatten_condition(condition, config.condition_channels, x.topology.batch_size)
        if config.condition_position == "absolute":
            tokens = position_condition(tokens, shape)
        embedding = self.time(t)
        modulation = embedding if self.shared_modulation is None else self.shared_modulation(embedding)
        h, outputs = self.encoder(x, embedding)
        dtype = h.dtype
        features = h.features if self.rope is not None else h.features + self._places(h.topology).to(dtype)
        packing = self._packing(h.topology, tokens.shape[1])
        tokens = tokens.to(dtype).flatten(0, 1)
        for block in self.blocks:
            features = block(features, modulation, tokens, packing, self.rope)
        h = self.decoder(h.replace(features), outputs, embedding, x.topology)
        normed = F.layer_norm(h.features.float(), h.features.shape[-1:])
        return x.replace(self.output(normed.to(h.dtype)).to(dtype))

    def _places(self, topology: Topology) -> Tensor:
        width = self.config.width
        return topology.memo(("smdit.sincos", width), lambda: sincos_embedding(topology.coords[:, 1:], width))

    def _packing(self, topology: Topology, num_condition_tokens: int) -> CrossTokens:
        rope = self.rope
        key = ("smdit.cross", num_condition_tokens, None if rope is None else rope.head_dim)

        def build() -> CrossTokens:
            table = None if rope is None else rope.table(topology.coords[:, 1:])
            return CrossTokens.build(topology.lengths, num_condition_tokens, topology.device, table)

        return topology.memo(key, build)
