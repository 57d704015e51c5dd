"""Stages ``structure-flow`` and ``flow``: both halves of generation (paper, sections 3.2 and 3.3)."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from flux_features import FluxFeatures
from gs_render import Camera, render
from jaxtyping import Float
from smdit import (
    EulerSampler,
    SMDiT,
    SMDiTConfig,
    StructureDiT,
    StructureDiTConfig,
    StructureFlowConfig,
    compile_blocks,
    flow_matching_loss,
)
from sparse_vae import SparseTensor, SparseVAE, SparseVAEConfig, StructureVAE, StructureVAEConfig, Topology
from torch import Tensor, nn

from diff2to3._errors import InputError
from diff2to3._plugins import BACKBONE, FEATURE_EXTRACTOR, FeatureExtractor, build, load_config_model, registry
from diff2to3._progress import track
from diff2to3.data._augment import hue_matrix, shift_hue
from diff2to3.data._extractor import ExtractorChoice, open_extractor
from diff2to3.train._batches import ConditionBatches, place
from diff2to3.train._checkpoint import load_model, read_config
from diff2to3.train._config import TrainConfig
from diff2to3.train._data import HeldData, open_data
from diff2to3.train._parallel import blocks
from diff2to3.train._photo import photograph
from diff2to3.train._stage import Batch, Batches
from diff2to3.train.stages._base import PictureStage, build_config, frozen, generator_of, on_white, part
from diff2to3.train.stages.structure_vae import dense_occupancy, from_the_front

SAMPLE_STEPS = 25
_SHOWN = 8  # objects on a sheet
_CHUNK = 128  # objects encoded at once


class _FlowStage(PictureStage):
    """A flow model conditioned on what a frozen extractor makes of pictures."""

    model: nn.Module
    extractor: FeatureExtractor
    has_half_weights = True

    def __init__(self, config: TrainConfig) -> None:
        super().__init__(config)
        choice = self.options.extractor
        if choice is not None:
            extractor: Any = build(FEATURE_EXTRACTOR, choice.name, choice.config)
        else:
            extractor = open_extractor(ExtractorChoice(source=str(part(config, "features"))))
        if isinstance(extractor, nn.Module):
            extractor = extractor.to(memory_format=torch.channels_last).requires_grad_(False).eval()  # type: ignore[call-overload]
        self.extractor = extractor
        self.token_shape = _token_shape(extractor)

    def check_condition(self, channels: int) -> None:
        """Raises an InputError unless the model takes the tokens that the extractor gives."""
        if channels != self.token_shape[-1]:
            raise InputError(
                f"the extractor gives tokens of {self.token_shape[-1]} channels, the model takes {channels}; "
                f"set model.condition_channels to {self.token_shape[-1]}"
            )

    def compile_parts(self, half: bool) -> None:
        extractor = self.extractor
        if isinstance(extractor, FluxFeatures) and extractor.config.architecture == "tiny":
            extractor.autoencoder.encoder.compile()  # type: ignore[attr-defined]
        if half:
            compile_blocks(self.model)

    def condition(self, batch: Batch) -> Float[Tensor, "B V rows columns C"]:
        """Image tokens of the condition crops, their hue turned, slightly moved in the frame, as if photographed."""
        shape = batch["condition"].shape[:2]
        rgba = batch["condition"].flatten(0, 1).float() / 255
        hue = batch["hue"].repeat_interleave(shape[1])
        premultiplied = shift_hue(rgba[:, :3], hue_matrix(hue)) * rgba[:, 3:]
        stack = torch.cat([premultiplied, rgba[:, 3:]], 1)
        if self.training and self.options.jitter:
            stack = _jitter(stack, self.options.jitter, generator_of(batch))
        if self.training and self.options.photo is not None:
            stack = photograph(stack, self.options.photo, generator_of(batch, 2))
        size = self.extractor.image_size
        if stack.shape[-1] != size:
            stack = F.interpolate(stack, (size, size), mode="bilinear", antialias=True)
        picture = stack[:, :3] + 1 - stack[:, 3:]
        own = getattr(self.extractor, "condition", None)
        with torch.no_grad():
            tokens = self.extractor.tokens(self.extractor(picture)) if own is None else own(picture)
        return tokens.unflatten(0, shape).float()

    def flow_loss(self, latents: Tensor | SparseTensor, batch: Batch) -> Tensor:
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

    model_config: Any
    mean: Tensor
    std: Tensor

    def __init__(self, config: TrainConfig) -> None:
        super().__init__(config)
        self.config = config
        self.model_config, self.model = _build_backbone(config.model)
        self.check_condition(self.model_config.condition_channels)
        vae = read_config(part(config, "vae"), SparseVAEConfig)
        if vae.latent_mean is None or vae.latent_std is None:
            raise InputError(f"{config.parts['vae']}: latent statistics are missing; run `diff2to3 data latents` first")
        self.register_buffer("mean", torch.tensor(vae.latent_mean))
        self.register_buffer("std", torch.tensor(vae.latent_std))

    def batches(self, config: TrainConfig, split: str, device: torch.device) -> Batches:
        data = open_data(config, split, ("render", "voxels", "features", "latents"), device)
        options = self.options
        return ConditionBatches(
            data, self.model_config.grid_size, options.frame, views=options.condition_views, with_latents=True
        )

    def prepare(self, batch: Batch) -> None:
        if (derive := getattr(self.model, "prepare", None)) is not None:  # not part of what a backbone has to have
            derive(batch["latents"].topology, (batch["condition"].shape[1], *self.token_shape[:2]))

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        latents = batch["latents"]
        latents = latents.replace((latents.features - self.mean) / self.std)
        return self.flow_loss(latents, batch), {}

    def sample(self, batch: Batch) -> Tensor:
        """First condition pictures, and what comes of them on the true voxels, from the front."""
        vae = frozen(load_model(part(self.config, "vae"), SparseVAEConfig, SparseVAE)).to(self.mean.device)
        latents = batch["latents"]
        noise = torch.randn(latents.features.shape, generator=generator_of(batch), device=self.mean.device)
        found = EulerSampler(steps=SAMPLE_STEPS, capture=False).sample(
            self.model, latents.replace(noise), self.condition(batch)
        )
        with torch.autocast(self.mean.device.type, enabled=False):
            objects = vae.decoder(found.replace(found.features.float() * self.std + self.mean))[:_SHOWN]
            pictures = on_white(batch["condition"][:_SHOWN, 0])
            camera = Camera.orbit(num_views=1, size=pictures.shape[-1])
            gaussians = vae.config.gaussians
            drawn = [render(g, camera, filter_2d=gaussians.filter_2d, antialias=True).color for g in objects]
        return torch.cat([pictures, torch.cat(drawn).permute(0, 3, 1, 2)])


class StructureFlowStage(_FlowStage):
    """The dense flow of stage 1 over the structure VAE's latents."""

    model: SMDiT | StructureDiT
    model_config: SMDiTConfig | StructureDiTConfig
    mean: Tensor
    std: Tensor

    def __init__(self, config: TrainConfig) -> None:
        super().__init__(config)
        overrides = dict(config.model)
        preset = StructureFlowConfig.preset(overrides.pop("preset", "tiny")).flow
        self.model_config = type(preset).model_validate(preset.model_dump() | overrides)
        self.model = (
            SMDiT(self.model_config) if isinstance(self.model_config, SMDiTConfig) else StructureDiT(self.model_config)
        )
        self.check_condition(self.model_config.condition_channels)
        folder = part(config, "structure_vae")
        self.vae = frozen(load_model(folder, StructureVAEConfig, StructureVAE))
        vae = self.vae.config
        if vae.latent_mean is None or vae.latent_std is None:
            raise InputError(
                f"{folder}: latent statistics are missing; they are written by `diff2to3 train structure-vae`"
            )
        self.vae_grid = vae.grid_size
        self._grids: dict[int, Topology] = {}
        self.register_buffer("mean", torch.tensor(vae.latent_mean).view(1, -1, 1, 1, 1))
        self.register_buffer("std", torch.tensor(vae.latent_std).view(1, -1, 1, 1, 1))

    def batches(self, config: TrainConfig, split: str, device: torch.device) -> Batches:
        data = open_data(config, split, ("render", "voxels"), device)
        frame, views = self.options.frame, self.options.condition_views
        if isinstance(data, HeldData):
            return _EncodedBatches(ConditionBatches(data, self.vae_grid, frame, views=views), self._encode)
        return ConditionBatches(data, self.vae_grid, frame, views=views, with_voxels=True)

    def prepare(self, batch: Batch) -> None:
        if "latents" not in batch:
            batch["latents"] = self._encode(batch["coords"], batch["batch_size"]).half()

    @torch.no_grad()
    def _encode(self, coords: Tensor, batch_size: int) -> Tensor:
        """Normalised structure latents [B, C, n, n, n] of surface voxels [N, 4]."""
        occupancy = dense_occupancy(coords, batch_size, self.vae_grid)
        with torch.autocast(occupancy.device.type, torch.bfloat16, enabled=occupancy.is_cuda):
            mean, _ = self.vae.encode(occupancy)
        return (mean.float() - self.mean) / self.std

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        return self.flow_loss(self._on_grid(batch["latents"].float()), batch), {}

    def sample(self, batch: Batch) -> Tensor:
        """First condition pictures, true voxels from the front, and those that come of the pictures."""
        true = batch["latents"].float()
        noise = torch.randn(true.shape, generator=generator_of(batch), device=true.device)
        sampler = EulerSampler(steps=SAMPLE_STEPS, capture=False)
        found = sampler.sample(self.model, self._on_grid(noise), self.condition(batch))
        if isinstance(found, SparseTensor):
            found = found.features.unflatten(0, (len(true), -1)).transpose(1, 2).reshape(true.shape)
        pictures = on_white(batch["condition"][:_SHOWN, 0])
        grids = [
            from_the_front((self.vae.decode(latents[:_SHOWN] * self.std + self.mean) > 0).float())
            for latents in (true, found.float())
        ]
        side = list(pictures.shape[-2:])
        return torch.cat([pictures, *(F.interpolate(grid, side) for grid in grids)])

    def _on_grid(self, latents: Float[Tensor, "B C n n n"]) -> Tensor | SparseTensor:
        """As the model takes them: an SMDiT sees voxels that are all active."""
        if not isinstance(self.model, SMDiT):
            return latents
        topology = self._grid(len(latents), latents.shape[-1], latents.device)
        return SparseTensor(latents.flatten(2).transpose(1, 2).reshape(-1, latents.shape[1]), topology)

    def compile_parts(self, half: bool) -> None:
        super().compile_parts(half)
        if not half:  # shapes are the same in every step, so it pays under autocast too
            for block in blocks(self.model):
                block.compile()

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


def _build_backbone(values: dict[str, Any]) -> tuple[Any, nn.Module]:
    """Config and model of ``{name: smdit, preset: ..., field: value, ...}``; any installed backbone may be named."""
    values = dict(values)
    name = values.pop("name", "smdit")
    config_class = load_config_model(registry().find(BACKBONE, name))
    if config_class is None:
        raise InputError(f"model: the backbone {name!r} has no config model, which training keeps with its weights")
    config = build_config(config_class, values)
    model = build(BACKBONE, name, config.model_dump())
    if not isinstance(model, nn.Module):
        raise InputError(f"model: the backbone {name!r} is a {type(model).__name__}, expected a torch.nn.Module")
    return config, model


@torch.no_grad()
def _token_shape(extractor: FeatureExtractor) -> tuple[int, int, int]:
    """Rows, columns and channels of the condition tokens of a picture."""
    size = extractor.image_size
    own = getattr(extractor, "condition", None)
    if own is not None:
        tokens = own(torch.zeros(1, 3, size, size))
    else:
        side = size // extractor.stride
        tokens = extractor.tokens(torch.zeros(1, extractor.channels, side, side))
    rows, columns, channels = tokens.shape[1:]
    return rows, columns, channels


def _jitter(images: Tensor, amount: float, generator: torch.Generator) -> Tensor:
    """Zooms and shifts pictures by up to ``amount`` of their side; outside is transparent."""
    zoom, dx, dy = (torch.rand(3, len(images), generator=generator, device=images.device) * 2 - 1) * amount
    zero = torch.zeros_like(zoom)
    affine = torch.stack([torch.stack([1 + zoom, zero, dx], -1), torch.stack([zero, 1 + zoom, dy], -1)], 1)
    grid = F.affine_grid(affine, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)
