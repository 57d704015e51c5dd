"""Stage ``vae``: the 2to3-VAE (paper, sections 3.1 and 3.3)."""

from __future__ import annotations

import torch
from gs_render import Camera, Gaussians, render_batch
from gs_render.metrics import psnr
from sparse_vae import SparseVAE, SparseVAEConfig, VAELossConfig, vae_loss
from torch import Tensor

from diff2to3.data._augment import hue_matrix, shift_hue
from diff2to3.train._batches import ViewBatches
from diff2to3.train._checkpoint import load_model
from diff2to3.train._config import TrainConfig
from diff2to3.train._data import open_data
from diff2to3.train._stage import Batch, Batches
from diff2to3.train.stages._base import PictureStage, build_config, composite, generator_of


class VAEStage(PictureStage):
    """The 2to3-VAE: features on voxels in, Gaussians out, compared with one random view (paper, section 3.3)."""

    model: SparseVAE
    model_config: SparseVAEConfig

    def __init__(self, config: TrainConfig) -> None:
        super().__init__(config)
        self.model_config = build_config(SparseVAEConfig, config.model)
        if "vae" in config.parts:  # go on from a trained one; its latents stay what flows were trained on
            self.model = load_model(config.parts["vae"], SparseVAEConfig, SparseVAE)
            self.model_config = self.model.config
            self.model.encoder.requires_grad_(False)
        else:
            self.model = SparseVAE(self.model_config)
        if self.options.volume_weight is None:
            volume_weight = VAELossConfig.for_model(self.model_config).volume_weight
            self.weights = self.weights.model_copy(update={"volume_weight": volume_weight})

    def batches(self, config: TrainConfig, split: str, device: torch.device) -> Batches:
        return ViewBatches(
            open_data(config, split, ("render", "voxels", "features"), device), self.model_config.grid_size
        )

    def prepare(self, batch: Batch) -> None:
        for half in (self.model.encoder, self.model.decoder):
            half.transformer.prepare(batch["features"].topology)

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        generator = generator_of(batch)
        objects, mean, logvar = self.model(batch["features"], generator)
        rgba = batch["image"].float() / 255
        ground = (torch.rand(len(rgba), 1, generator=generator, device=rgba.device) < 0.5).float().expand(-1, 3)
        target = composite(shift_hue(rgba[:, :3], hue_matrix(batch["hue"])), rgba[:, 3:], ground[..., None, None])
        image = self._draw(objects, batch, ground)
        loss, terms = vae_loss(image, target, objects, mean.features, logvar.features, self.weights, self.lpips)
        return loss, {"psnr": psnr(image.detach(), target).mean()} | terms

    def _draw(self, objects: list[Gaussians], batch: Batch, ground: Tensor) -> Tensor:
        """Pictures [B, 3, H, W] of the objects from the batch's cameras on grounds [B, 3]."""
        size = batch["image"].shape[-1]
        with torch.autocast(ground.device.type, enabled=False):
            drawn = render_batch(
                objects,
                Camera(batch["pose"], batch["intrinsics"], size, size),
                ground,
                filter_2d=self.model_config.gaussians.filter_2d,
                antialias=True,
            )
        return drawn.color.permute(0, 3, 1, 2)

    def sample(self, batch: Batch) -> Tensor:
        """Targets of the batch on white, and what the model makes of their objects."""
        objects = self.model.decoder(self.model.encoder(batch["features"])[0])
        rgba = batch["image"].float() / 255
        target = composite(shift_hue(rgba[:, :3], hue_matrix(batch["hue"])), rgba[:, 3:], rgba.new_ones(()))
        return torch.cat([target[:8], self._draw(objects, batch, rgba.new_ones(len(rgba), 3))[:8]])
