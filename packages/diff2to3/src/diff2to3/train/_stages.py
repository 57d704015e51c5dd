"""The five stages: what each trains, on what, with which loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from flux_features import FluxFeatures, FluxFeaturesConfig
from gs_render import Camera, render_batch
from gs_render.metrics import LPIPS, psnr, ssim
from pydantic import BaseModel, ConfigDict
from smdit import SMDiT, SMDiTConfig, StructureFlowConfig, flow_matching_loss
from sparse_vae import (
    SparseTensor,
    SparseVAE,
    SparseVAEConfig,
    StructureVAE,
    StructureVAEConfig,
    Topology,
    dice_loss,
    gaussian_regularisation,
    kl_divergence,
)
from torch import Tensor, nn

from diff2to3.data._augment import hue_matrix, shift_hue
from diff2to3.train._batches import ConditionBatches, ObjectData, OccupancyBatches, PictureBatches, ViewBatches
from diff2to3.train._checkpoint import read_config, read_weights
from diff2to3.train._config import TrainConfig
from diff2to3.train._engine import Batch, Batches, Stage

C = TypeVar("C", bound=BaseModel)


class Options(BaseModel):
    """Loss weights and augmentation; a stage uses those that concern it. Defaults: TRELLIS's, see docs."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    lpips: Path | None = None
    lpips_backbone: str = "vgg"
    lpips_weight: float = 0.2
    ssim_weight: float = 0.2
    kl_weight: float = 1e-6
    volume_weight: float = 150.0
    opacity_weight: float = 1e-3
    bce_weight: float = 1.0
    frame: str = "view-snapped"
    time: str = "uniform"
    p_uncond: float = 0.1
    jitter: float = 0.04


def build_config(config_class: type[C], values: dict[str, Any]) -> C:
    """A model config from ``{preset: name, field: value, ...}``."""
    values = dict(values)
    preset = config_class.preset(values.pop("preset", "tiny"))  # type: ignore[attr-defined]
    return config_class.model_validate(preset.model_dump() | values)


class _Base(Stage):
    def __init__(self, config: TrainConfig) -> None:
        super().__init__()
        self.options = Options(**config.options)
        self.lpips = LPIPS(self.options.lpips, self.options.lpips_backbone) if self.options.lpips else None  # type: ignore[arg-type]

    def picture_loss(self, image: Tensor, target: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """L1 + SSIM + LPIPS with their weights, in fp32."""
        image, target = image.float(), target.float()
        l1 = F.l1_loss(image, target)
        loss = l1 + self.options.ssim_weight * (1 - ssim(image, target).mean())
        figures = {"psnr": psnr(image.detach(), target).mean()}
        if self.lpips is not None:
            distance = self.lpips(image, target).mean()
            loss, figures["lpips"] = loss + self.options.lpips_weight * distance, distance.detach()
        return loss, figures


class AutoencoderStage(_Base):
    """The FLUX-shaped tiny autoencoder: pictures in, the same pictures out."""

    model: FluxFeatures

    def __init__(self, config: TrainConfig) -> None:
        super().__init__(config)
        self.model_config = build_config(FluxFeaturesConfig, config.model)
        self.model = FluxFeatures(self.model_config).to(memory_format=torch.channels_last)
        self.register_buffer("recent", torch.zeros(2, self.model_config.latent_channels))

    def batches(self, config: TrainConfig, split: str, device: torch.device) -> Batches:
        return PictureBatches(ObjectData(config, split, "render", device))

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        generator = _generator(batch)
        rgba = batch["image"].float() / 255
        count = len(rgba)
        hue = torch.rand(count, generator=generator, device=rgba.device) * 360
        ground = torch.rand(count, 3, 1, 1, generator=generator, device=rgba.device)
        white = torch.rand(count, 1, 1, 1, generator=generator, device=rgba.device) < 0.7
        picture = _on(shift_hue(rgba[:, :3], hue_matrix(hue)), rgba[:, 3:], torch.where(white, 1.0, ground))
        latent = self.model(picture)
        with torch.no_grad():
            moments = torch.stack([latent.float().mean((0, 2, 3)), latent.float().square().mean((0, 2, 3))])
            self.recent.lerp_(moments, 0.02)
        # A little noise in latent units keeps the latents smooth; the pull to unit scale fixes their free scale.
        noise = 0.05 * torch.randn(latent.shape, generator=generator, device=latent.device, dtype=latent.dtype)
        loss, figures = self.picture_loss(self.model.decode(latent + noise), picture)
        return loss + 1e-3 * latent.float().square().mean(), figures | {"latent_std": latent.detach().float().std()}

    def finish(self) -> tuple[BaseModel, dict[str, Tensor]]:
        mean, std = _statistics(self.recent)
        return self.model_config.model_copy(update={"channel_mean": mean, "channel_std": std}), self.model.state_dict()


class VAEStage(_Base):
    """The 2to3-VAE: features on voxels in, Gaussians out, compared with one random view (paper, section 3.3)."""

    model: SparseVAE

    def __init__(self, config: TrainConfig) -> None:
        super().__init__(config)
        self.model_config = build_config(SparseVAEConfig, config.model)
        self.model = SparseVAE(self.model_config)

    def batches(self, config: TrainConfig, split: str, device: torch.device) -> Batches:
        return ViewBatches(ObjectData(config, split, "features", device), self.model_config.grid_size)

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        generator = _generator(batch)
        grid_size, count = self.model_config.grid_size, batch["batch_size"]
        topology, order = Topology.from_coords(batch["coords"], grid_size, count)
        objects, mean, logvar = self.model(SparseTensor(batch["features"][order], topology), generator)
        rgba = batch["image"].float() / 255
        ground = (torch.rand(len(rgba), 1, generator=generator, device=rgba.device) < 0.5).float().expand(-1, 3)
        target = _on(shift_hue(rgba[:, :3], hue_matrix(batch["hue"])), rgba[:, 3:], ground[..., None, None])
        size = rgba.shape[-1]
        with torch.autocast(rgba.device.type, enabled=False):
            drawn = render_batch(
                objects,
                Camera(batch["pose"], batch["intrinsics"], size, size),
                ground,
                filter_2d=self.model_config.gaussians.filter_2d,
                antialias=True,
            )
        loss, figures = self.picture_loss(drawn.color.permute(0, 3, 1, 2), target)
        divergence = kl_divergence(mean.features, logvar.features)
        geometry = gaussian_regularisation(objects, self.options.volume_weight, self.options.opacity_weight)
        loss = loss + self.options.kl_weight * divergence + geometry
        return loss, figures | {"kl": divergence.detach(), "geometry": geometry.detach()}


class StructureVAEStage(_Base):
    """Dense occupancy autoencoder of stage 1."""

    model: StructureVAE

    def __init__(self, config: TrainConfig) -> None:
        super().__init__(config)
        self.model_config = build_config(StructureVAEConfig, config.model)
        self.model = StructureVAE(self.model_config)
        self.register_buffer("recent", torch.zeros(2, self.model_config.latent_channels))

    def batches(self, config: TrainConfig, split: str, device: torch.device) -> Batches:
        return OccupancyBatches(ObjectData(config, split, "voxels", device), self.model_config.grid_size)

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        occupancy = dense_occupancy(batch, self.model_config.grid_size)
        mean, logvar = self.model.encode(occupancy)
        with torch.no_grad():
            moments = torch.stack([mean.float().mean((0, 2, 3, 4)), mean.float().square().mean((0, 2, 3, 4))])
            self.recent.lerp_(moments, 0.02)
        latent = mean
        if self.training:
            noise = torch.randn(mean.shape, generator=_generator(batch), device=mean.device)
            latent = mean + noise * (0.5 * logvar).exp()
        logits = self.model.decode(latent).float()
        dice = dice_loss(logits, occupancy)
        divergence = kl_divergence(mean, logvar)
        bce = F.binary_cross_entropy_with_logits(logits, occupancy)
        found, true = logits > 0, occupancy > 0
        iou = (found & true).flatten(1).sum(1) / (found | true).flatten(1).sum(1).clamp_min(1)
        loss = dice + self.options.bce_weight * bce + self.options.kl_weight * divergence
        return loss, {"dice": dice.detach(), "iou": iou.float().mean(), "kl": divergence.detach()}

    def finish(self) -> tuple[BaseModel, dict[str, Tensor]]:
        mean, std = _statistics(self.recent)
        return self.model_config.model_copy(update={"latent_mean": mean, "latent_std": std}), self.model.state_dict()


class _FlowBase(_Base):
    """A flow model conditioned on the features of a picture."""

    def __init__(self, config: TrainConfig) -> None:
        super().__init__(config)
        folder = _part(config, "features")
        self.extractor = _frozen(FluxFeatures(read_config(folder, FluxFeaturesConfig)), folder)

    def condition(self, batch: Batch) -> Tensor:
        """Image tokens [B, 1, h, w, C] of the batch's condition crops, their hue turned, slightly moved in the frame."""
        rgba = batch["condition"].float() / 255
        premultiplied = shift_hue(rgba[:, :3], hue_matrix(batch["hue"])) * rgba[:, 3:]
        stack = torch.cat([premultiplied, rgba[:, 3:]], 1)
        if self.training and self.options.jitter:
            stack = _jitter(stack, self.options.jitter, _generator(batch))
        picture = stack[:, :3] + 1 - stack[:, 3:]
        with torch.no_grad():
            return self.extractor.tokens(self.extractor(picture))[:, None].float()


class FlowStage(_FlowBase):
    """SMDiT over the 2to3-VAE's latents (paper, sections 3.2 and 3.3)."""

    def __init__(self, config: TrainConfig) -> None:
        super().__init__(config)
        self.model_config = build_config(SMDiTConfig, config.model)
        self.model = SMDiT(self.model_config)
        vae = read_config(_part(config, "vae"), SparseVAEConfig)
        if vae.latent_mean is None or vae.latent_std is None:
            raise ValueError(f"{config.parts['vae']}: latent statistics are missing; run `diff2to3 data latents` first")
        self.register_buffer("mean", torch.tensor(vae.latent_mean))
        self.register_buffer("std", torch.tensor(vae.latent_std))

    def batches(self, config: TrainConfig, split: str, device: torch.device) -> Batches:
        data = ObjectData(config, split, "latents", device)
        return ConditionBatches(data, self.model_config.grid_size, self.options.frame, latents=True)

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        grid_size, count = self.model_config.grid_size, batch["batch_size"]
        topology, order = Topology.from_coords(batch["coords"], grid_size, count)
        latents = SparseTensor((batch["latents"][order] - self.mean) / self.std, topology)
        loss = flow_matching_loss(
            self.model,
            latents,
            self.condition(batch),
            _generator(batch, 1),
            p_uncond=self.options.p_uncond if self.training else 0.0,
            time=self.options.time,  # type: ignore[arg-type]
        )
        return loss, {}


class StructureFlowStage(_FlowBase):
    """The dense flow of stage 1 over the structure VAE's latents."""

    def __init__(self, config: TrainConfig) -> None:
        super().__init__(config)
        preset, overrides = StructureFlowConfig.preset(config.model.get("preset", "tiny")), dict(config.model)
        overrides.pop("preset", None)
        self.model_config = SMDiTConfig.model_validate(preset.flow.model_dump() | overrides)
        self.model = SMDiT(self.model_config)
        folder = _part(config, "structure_vae")
        vae = read_config(folder, StructureVAEConfig)
        if vae.latent_mean is None or vae.latent_std is None:
            raise ValueError(
                f"{folder}: latent statistics are missing; they are written by `diff2to3 train structure-vae`"
            )
        self.vae = _frozen(StructureVAE(vae), folder)
        self.vae_grid = vae.grid_size
        self._grids: dict[int, Topology] = {}
        self.register_buffer("mean", torch.tensor(vae.latent_mean).view(1, -1, 1, 1, 1))
        self.register_buffer("std", torch.tensor(vae.latent_std).view(1, -1, 1, 1, 1))

    def batches(self, config: TrainConfig, split: str, device: torch.device) -> Batches:
        data = ObjectData(config, split, "voxels", device)
        return ConditionBatches(data, self.vae_grid, self.options.frame, latents=False)

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.no_grad():
            mean, _ = self.vae.encode(dense_occupancy(batch, self.vae_grid))
            latents = (mean.float() - self.mean) / self.std
        topology = self._grid(len(latents), latents.shape[-1], latents.device)
        rows = latents.flatten(2).transpose(1, 2).reshape(-1, latents.shape[1])
        loss = flow_matching_loss(
            self.model,
            SparseTensor(rows, topology),
            self.condition(batch),
            _generator(batch, 1),
            p_uncond=self.options.p_uncond if self.training else 0.0,
            time=self.options.time,  # type: ignore[arg-type]
        )
        return loss, {}

    def _grid(self, batch_size: int, size: int, device: torch.device) -> Topology:
        """One topology for all steps, so that packing and rotary tables are made once."""
        if batch_size not in self._grids:
            self._grids[batch_size] = Topology.full(batch_size, size, device)
        return self._grids[batch_size]


STAGES: dict[str, type[Stage]] = {
    "autoencoder": AutoencoderStage,
    "vae": VAEStage,
    "structure-vae": StructureVAEStage,
    "structure-flow": StructureFlowStage,
    "flow": FlowStage,
}


def dense_occupancy(batch: Batch, grid_size: int) -> Tensor:
    """Surface voxels of a batch -> occupancy [B, 1, N, N, N] float."""
    b, x, y, z = batch["coords"].long().unbind(1)
    occupancy = torch.zeros(batch["batch_size"], 1, grid_size, grid_size, grid_size, device=b.device)
    occupancy[b, 0, x, y, z] = 1.0
    return occupancy


def _generator(batch: Batch, stream: int = 0) -> torch.Generator:
    """Randomness of a step: a function of the batch's seed alone, so that a resumed run repeats it."""
    tensor = next(value for value in batch.values() if isinstance(value, Tensor))
    return torch.Generator(tensor.device).manual_seed((batch["seed"] + stream) % 2**63)


def _statistics(moments: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel from the first two moments [2, C]."""
    mean, square = moments.double()
    return tuple(mean.tolist()), tuple((square - mean**2).clamp_min(1e-8).sqrt().tolist())


def _on(color: Tensor, alpha: Tensor, ground: Tensor) -> Tensor:
    return color * alpha + ground * (1 - alpha)


def _jitter(images: Tensor, amount: float, generator: torch.Generator) -> Tensor:
    """Zooms and shifts pictures by up to ``amount`` of their side; outside is transparent."""
    zoom, dx, dy = (torch.rand(3, len(images), generator=generator, device=images.device) * 2 - 1) * amount
    zero = torch.zeros_like(zoom)
    affine = torch.stack([torch.stack([1 + zoom, zero, dx], -1), torch.stack([zero, 1 + zoom, dy], -1)], 1)
    grid = F.affine_grid(affine, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


def _part(config: TrainConfig, role: str) -> Path:
    if role not in config.parts:
        raise ValueError(f"this stage builds on a trained {role}; give parts: {{{role}: FOLDER}}")
    return config.parts[role]


def _frozen(module: nn.Module, folder: Path) -> Any:
    module.load_state_dict(read_weights(folder))
    return module.requires_grad_(False).eval()
