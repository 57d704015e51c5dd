"""Stages ``structure-flow`` and ``flow``: both halves of generation (paper, sections 3.2 and 3.3)."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import torch
import torch.nn.functional as F
from flux_features import FluxFeatures, FluxFeaturesConfig
from smdit import SMDiT, SMDiTConfig, StructureFlowConfig, flow_matching_loss
from sparse_vae import SparseTensor, SparseVAEConfig, StructureVAE, StructureVAEConfig, Topology
from torch import Tensor, nn

from diff2to3._errors import InputError
from diff2to3._progress import track
from diff2to3.data._augment import hue_matrix, shift_hue
from diff2to3.train._batches import ConditionBatches, place
from diff2to3.train._checkpoint import read_config
from diff2to3.train._config import TrainConfig
from diff2to3.train._data import HeldData, open_data
from diff2to3.train._engine import Batch, Batches
from diff2to3.train.stages._base import PictureStage, build_config, frozen, generator_of, part
from diff2to3.train.stages.structure_vae import dense_occupancy

_CHUNK = 128  # objects encoded at once


class _FlowStage(PictureStage):
    """A flow model conditioned on the features of a picture."""

    model: SMDiT

    def __init__(self, config: TrainConfig) -> None:
        super().__init__(config)
        folder = part(config, "features")
        extractor = FluxFeatures(read_config(folder, FluxFeaturesConfig)).to(memory_format=torch.channels_last)
        self.extractor = frozen(extractor, folder)

    def static_modules(self) -> list[nn.Module]:
        return [self.extractor.autoencoder.encoder] if self.extractor.config.architecture == "tiny" else []

    def condition(self, batch: Batch) -> Tensor:
        """Image tokens [B, 1, h, w, C] of the condition crops, their hue turned, slightly moved in the frame."""
        rgba = batch["condition"].float() / 255
        premultiplied = shift_hue(rgba[:, :3], hue_matrix(batch["hue"])) * rgba[:, 3:]
        stack = torch.cat([premultiplied, rgba[:, 3:]], 1)
        if self.training and self.options.jitter:
            stack = _jitter(stack, self.options.jitter, generator_of(batch))
        picture = stack[:, :3] + 1 - stack[:, 3:]
        with torch.no_grad():
            return self.extractor.tokens(self.extractor(picture))[:, None].float()

    def flow_loss(self, latents: SparseTensor, batch: Batch) -> Tensor:
        """The flow-matching loss of normalised latents under the batch's conditions."""
        return flow_matching_loss(
            self.model,
            latents,
            self.condition(batch),
            generator_of(batch, 1),
            p_uncond=self.options.p_uncond if self.training else 0.0,
            time=self.options.time,
            time_mean=self.options.time_mean,
            time_std=self.options.time_std,
        )


class FlowStage(_FlowStage):
    """SMDiT over the 2to3-VAE's latents (paper, sections 3.2 and 3.3)."""

    model_config: SMDiTConfig
    mean: Tensor
    std: Tensor

    def __init__(self, config: TrainConfig) -> None:
        super().__init__(config)
        self.model_config = build_config(SMDiTConfig, config.model)
        self.model = SMDiT(self.model_config)
        vae = read_config(part(config, "vae"), SparseVAEConfig)
        if vae.latent_mean is None or vae.latent_std is None:
            raise InputError(f"{config.parts['vae']}: latent statistics are missing; run `diff2to3 data latents` first")
        self.register_buffer("mean", torch.tensor(vae.latent_mean))
        self.register_buffer("std", torch.tensor(vae.latent_std))

    def batches(self, config: TrainConfig, split: str, device: torch.device) -> Batches:
        data = open_data(config, split, ("render", "voxels", "features", "latents"), device)
        return ConditionBatches(data, self.model_config.grid_size, self.options.frame, with_latents=True)

    def prepare(self, batch: Batch) -> None:
        rows, columns = (
            side // (self.extractor.stride * self.extractor.patch) for side in batch["condition"].shape[-2:]
        )
        self.model.prepare(batch["latents"].topology, (1, rows, columns))

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        latents = batch["latents"]
        latents = latents.replace((latents.features - self.mean) / self.std)
        return self.flow_loss(latents, batch), {}


class StructureFlowStage(_FlowStage):
    """The dense flow of stage 1 over the structure VAE's latents."""

    model_config: SMDiTConfig
    mean: Tensor
    std: Tensor

    def __init__(self, config: TrainConfig) -> None:
        super().__init__(config)
        preset, overrides = StructureFlowConfig.preset(config.model.get("preset", "tiny")), dict(config.model)
        overrides.pop("preset", None)
        self.model_config = SMDiTConfig.model_validate(preset.flow.model_dump() | overrides)
        self.model = SMDiT(self.model_config)
        folder = part(config, "structure_vae")
        vae = read_config(folder, StructureVAEConfig)
        if vae.latent_mean is None or vae.latent_std is None:
            raise InputError(
                f"{folder}: latent statistics are missing; they are written by `diff2to3 train structure-vae`"
            )
        self.vae = frozen(StructureVAE(vae), folder)
        self.vae_grid = vae.grid_size
        self._grids: dict[int, Topology] = {}
        self.register_buffer("mean", torch.tensor(vae.latent_mean).view(1, -1, 1, 1, 1))
        self.register_buffer("std", torch.tensor(vae.latent_std).view(1, -1, 1, 1, 1))

    def batches(self, config: TrainConfig, split: str, device: torch.device) -> Batches:
        data = open_data(config, split, ("render", "voxels"), device)
        if isinstance(data, HeldData):
            return _EncodedBatches(ConditionBatches(data, self.vae_grid, self.options.frame), self._encode)
        return ConditionBatches(data, self.vae_grid, self.options.frame, with_voxels=True)

    def prepare(self, batch: Batch) -> None:
        if "latents" not in batch:
            batch["latents"] = self._encode(batch["coords"], len(batch["hue"])).half()

    @torch.no_grad()
    def _encode(self, coords: Tensor, batch_size: int) -> Tensor:
        """Normalised structure latents [B, C, n, n, n] of surface voxels [N, 4]."""
        occupancy = dense_occupancy(coords, batch_size, self.vae_grid)
        with torch.autocast(occupancy.device.type, torch.bfloat16, enabled=occupancy.is_cuda):
            mean, _ = self.vae.encode(occupancy)
        return (mean.float() - self.mean) / self.std

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        latents = batch["latents"].float()
        topology = self._grid(len(latents), latents.shape[-1], latents.device)
        rows = latents.flatten(2).transpose(1, 2).reshape(-1, latents.shape[1])
        return self.flow_loss(SparseTensor(rows, topology), batch), {}

    def static_modules(self) -> list[nn.Module]:
        return [*super().static_modules(), *self.model.double_blocks, *self.model.single_blocks]

    def _grid(self, batch_size: int, size: int, device: torch.device) -> Topology:
        """One topology for all steps, so that packing and rotary tables are made once."""
        if batch_size not in self._grids:
            self._grids[batch_size] = Topology.full(batch_size, size, device)
        return self._grids[batch_size]


class _EncodedBatches:
    """Conditions with the structure ``latents`` [B, C, n, n, n] of their objects.

    An object has few of them, one for every quarter turn and mirror image: all are encoded once, at the start.
    """

    def __init__(self, batches: ConditionBatches, encode: Callable[[Tensor, int], Tensor]) -> None:
        self.batches, data = batches, batches.data
        parts = []
        for first in track(range(0, len(data), _CHUNK), "structure latents"):
            objects = torch.arange(first, min(first + _CHUNK, len(data)))
            coords, batch = data.voxels(objects)
            for mirror, turn in product(range(2), range(4)):
                mirrors, turns = (torch.full((len(objects),), value, device=batch.device) for value in (mirror, turn))
                parts.append(encode(place(coords, batch, mirrors, turns, batches.grid_size), len(objects)).half())
            parts[-8:] = [torch.stack(parts[-8:], 1).unflatten(1, (2, 4))]
        self.table = torch.cat(parts)

    def __getitem__(self, step: int) -> Batch:
        batch = self.batches[step]
        return batch | {"latents": self.table[batch["object"], batch["mirror"], batch["turn"]]}


def _jitter(images: Tensor, amount: float, generator: torch.Generator) -> Tensor:
    """Zooms and shifts pictures by up to ``amount`` of their side; outside is transparent."""
    zoom, dx, dy = (torch.rand(3, len(images), generator=generator, device=images.device) * 2 - 1) * amount
    zero = torch.zeros_like(zoom)
    affine = torch.stack([torch.stack([1 + zoom, zero, dx], -1), torch.stack([zero, 1 + zoom, dy], -1)], 1)
    grid = F.affine_grid(affine, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)
