"""Dense flow over structure latents: TRELLIS's stage 1 (trellis/models/sparse_structure_flow.py)."""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from jaxtyping import Float
from sparse_vae import Topology, patchify, unpatchify
from torch import Tensor, nn

from smdit._config import StructureDiTConfig
from smdit._cross_blocks import CrossBlock, CrossTokens
from smdit._embedding import TimeEmbedding, flatten_condition, position_condition, sincos_embedding
from smdit._init import initialise
from smdit._modulation import Modulation


class StructureDiT(nn.Module):
    """Velocity of dense structure latents, given condition tokens by cross-attention.

    Args:
        config: sizes and options; `StructureDiTConfig.preset(name)` gives known ones.
    """

    positions: Tensor

    capturable = True  # see EulerSampler.capture

    def __init__(self, config: StructureDiTConfig) -> None:
        super().__init__()
        self.config = config
        width, cell = config.width, config.patch_size**3
        self.time = TimeEmbedding(width)
        self.input = nn.Linear(config.latent_channels * cell, width)
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
        self.output = nn.Linear(width, (config.out_channels or config.latent_channels) * cell)
        tokens = Topology.full(1, config.grid_size // config.patch_size).coords[:, 1:]
        self.register_buffer("positions", sincos_embedding(tokens, width), persistent=False)
        initialise(self)
        nn.init.zeros_(self.output.weight)

    def forward(
        self, x: Float[Tensor, "B C n n n"], t: Float[Tensor, " B"], condition: Float[Tensor, "B *tokens K"]
    ) -> Float[Tensor, "B D n n n"]:
        """Velocity of `x` at time `t`.

        Args:
            x: noisy latents, `n = config.grid_size`.
            t: flow time of every object in [0, 1]; 1 is noise.
            condition: [B, tokens, condition_channels] or [B, images, rows, columns, condition_channels]; zeros for
                the unconditional velocity.
        """
        config = self.config
        expected = (len(x), config.latent_channels, *[config.grid_size] * 3)
        if x.shape != expected or t.shape != (len(x),):
            raise ValueError(
                f"x and t have shapes {tuple(x.shape)} and {tuple(t.shape)}, expected {expected} and ({len(x)},)"
            )
        dtype = self.input.weight.dtype
        tokens, shape = flatten_condition(condition, config.condition_channels, len(x))
        if config.condition_position == "absolute":
            tokens = position_condition(tokens, shape)
        embedding = self.time(t)
        modulation = embedding if self.shared_modulation is None else self.shared_modulation(embedding)
        cells = patchify(x.to(dtype), config.patch_size).flatten(2).transpose(1, 2)
        h = (self.input(cells).to(dtype) + self.positions.to(dtype)).flatten(0, 1)
        packing = _packing(len(x), cells.shape[1], tokens.shape[1], x.device)
        tokens = tokens.to(dtype).flatten(0, 1)
        for block in self.blocks:
            h = block(h, modulation, tokens, packing)
        h = self.output(F.layer_norm(h.float(), h.shape[-1:]).to(h.dtype)).to(dtype)
        side = config.grid_size // config.patch_size
        return unpatchify(h.unflatten(0, (len(x), -1)).transpose(1, 2).unflatten(-1, (side,) * 3), config.patch_size)


@lru_cache(maxsize=4)
def _packing(batch_size: int, num_tokens: int, num_condition_tokens: int, device: torch.device) -> CrossTokens:
    """The packing of dense tokens, kept from step to step: making it waits for the device."""
    with torch.inference_mode(False):  # the first use may be a sampler's, a later one in training
        return CrossTokens.build([num_tokens] * batch_size, num_condition_tokens, device)
