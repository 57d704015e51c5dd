"""Stage 1: from image tokens to the voxels that the object occupies."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from sparse_vae import SparseTensor, StructureDecoder, Topology
from torch import Tensor, nn

from smdit._config import SMDiTConfig, StructureFlowConfig
from smdit._flow import voxel_noise
from smdit._model import SMDiT
from smdit._samplers import Callback, make_sampler
from smdit._structure_dit import StructureDiT


class StructureFlow(nn.Module):
    """A flow over structure latents followed by the structure VAE's decoder.

    Args:
        config: sizes and options; `StructureFlowConfig.preset(name)` gives known ones.

    To train it: `flow_matching_loss(stage.flow, stage.to_state(z0, grid), condition, generator)`.
    """

    def __init__(self, config: StructureFlowConfig) -> None:
        super().__init__()
        self.config = config
        self.flow = SMDiT(config.flow) if isinstance(config.flow, SMDiTConfig) else StructureDiT(config.flow)
        self.decoder = StructureDecoder(config.decoder)

    @property
    def condition_channels(self) -> int:
        """Channels of an image token."""
        return self.config.flow.condition_channels

    @property
    def grid_size(self) -> int:
        """Side of the grid of the voxels returned by `sample`."""
        return self.config.decoder.grid_size

    @property
    def latent_size(self) -> int:
        """Side of the grid of structure latents."""
        return self.config.decoder.latent_size

    def to_state(self, z: Float[Tensor, "B C n n n"], grid: Topology | None = None) -> Tensor | SparseTensor:
        """Dense latents in the form that `flow` takes: themselves, or voxels that are all active.

        Args:
            z: normalised latents, x, y, z from the slowest to the fastest axis.
            grid: `Topology.full(B, n, device)`. Pass the same object at every training step, so that packing and rotary
                tables are made once; by default a new one is made.
        """
        if not isinstance(self.flow, SMDiT):
            return z
        grid = Topology.full(len(z), self.latent_size, z.device) if grid is None else grid
        return SparseTensor(z.flatten(2).transpose(1, 2).flatten(0, 1), grid)

    def from_state(self, state: Tensor | SparseTensor) -> Float[Tensor, "B C n n n"]:
        """The opposite of `to_state`."""
        if isinstance(state, Tensor):
            return state
        rows = state.features.unflatten(0, (state.topology.batch_size, -1)).transpose(1, 2)
        return rows.unflatten(-1, (self.latent_size,) * 3)

    @torch.no_grad()
    def sample(
        self,
        condition: Float[Tensor, "B images rows columns channels"],
        *,
        seeds: Sequence[int],
        steps: int | None = None,
        guidance: float | None = None,
        callback: Callback | None = None,
    ) -> list[Int[Tensor, "L 3"]]:
        """Occupied voxels of B objects, int32 [L, 3] in a grid of side `grid_size`, sorted; L can be zero.

        Args:
            condition: image tokens of every object.
            seeds: one integer an object. An object's noise depends on its seed alone, not on the batch around it.
            steps: number of sampling steps; by default that of `config.sampler`.
            guidance: w of the classifier-free guidance; by default that of `config.sampler`.
            callback: called with (steps done, steps in all).
        """
        if len(seeds) != len(condition):
            raise ValueError(f"{len(seeds)} seeds for {len(condition)} objects: give one seed an object")
        overrides = {"steps": steps, "guidance": guidance}
        options = self.config.sampler.model_copy(update={k: v for k, v in overrides.items() if v is not None})
        state = self.to_state(self._noise(seeds).to(condition.device))
        state = make_sampler(options).sample(self.flow, state, condition, callback=callback)
        return self.decoder.occupied(self.decoder.denormalise(self.from_state(state)))

    def _noise(self, seeds: Sequence[int]) -> Float[Tensor, "B C n n n"]:
        size, channels = self.latent_size, self.config.decoder.latent_channels
        voxels = Topology.full(1, size).coords[:, 1:]
        rows = torch.stack([voxel_noise(voxels, channels, size, seed) for seed in seeds])
        return rows.transpose(1, 2).unflatten(-1, (size, size, size))
