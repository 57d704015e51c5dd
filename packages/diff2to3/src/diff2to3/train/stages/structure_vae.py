"""Stage ``structure-vae``: occupancy and its latents (TRELLIS, sparse_structure_vae)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from pydantic import BaseModel
from sparse_vae import StructureVAE, StructureVAEConfig, dice_loss, kl_divergence
from torch import Tensor

from diff2to3.train._batches import OccupancyBatches
from diff2to3.train._config import TrainConfig
from diff2to3.train._data import open_data
from diff2to3.train._engine import Batch, Batches
from diff2to3.train.stages._base import PictureStage, build_config, generator_of, statistics

MEASURED_BATCHES = 32
"""Batches that the statistics of the latents are taken from."""


class StructureVAEStage(PictureStage):
    """Dense occupancy autoencoder of stage 1."""

    model: StructureVAE
    model_config: StructureVAEConfig

    def __init__(self, config: TrainConfig) -> None:
        super().__init__(config)
        self.config = config
        self.model_config = build_config(StructureVAEConfig, config.model)
        self.model = StructureVAE(self.model_config)

    def batches(self, config: TrainConfig, split: str, device: torch.device) -> Batches:
        return OccupancyBatches(open_data(config, split, ("voxels",), device), self.model_config.grid_size)

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        occupancy = dense_occupancy(batch["coords"], batch["batch_size"], self.model_config.grid_size)
        mean, logvar = self.model.encode(occupancy)
        latent = mean
        if self.training:
            noise = torch.randn(mean.shape, generator=generator_of(batch), device=mean.device)
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
        """Adds the statistics of the latents: of the weights that are kept, on batches of the training split."""
        device = next(self.model.parameters()).device
        batches = self.batches(self.config, self.config.split, device)
        moments = torch.zeros(2, self.model_config.latent_channels, dtype=torch.float64, device=device)
        for step in range(MEASURED_BATCHES):
            batch = batches[step]
            coords = batch["coords"].to(device)
            latents = self.model.encode(dense_occupancy(coords, batch["batch_size"], self.model_config.grid_size))[0]
            moments += torch.stack([latents.double().mean((0, 2, 3, 4)), latents.double().square().mean((0, 2, 3, 4))])
        mean, std = statistics(moments / MEASURED_BATCHES)
        return self.model_config.model_copy(update={"latent_mean": mean, "latent_std": std}), self.model.state_dict()


def dense_occupancy(coords: Int[Tensor, "N 4"], batch_size: int, grid_size: int) -> Float[Tensor, "B 1 n n n"]:
    """Surface voxels (object, x, y, z) of a batch -> occupancy, `n = grid_size`."""
    b, x, y, z = coords.long().unbind(1)
    occupancy = torch.zeros(batch_size, 1, grid_size, grid_size, grid_size, device=b.device)
    occupancy[b, 0, x, y, z] = 1.0
    return occupancy
