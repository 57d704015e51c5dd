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
from diff2to3.train._stage import Batch, Batches, to_device
from diff2to3.train.stages._base import PictureStage, build_config, generator_of, measure


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

    def sample(self, batch: Batch) -> Tensor:
        """Occupancy of the batch's first objects from the front, and what the model makes of it."""
        true = dense_occupancy(batch["coords"], batch["batch_size"], self.model_config.grid_size)[:8]
        found = self.model.decode(self.model.encode(true)[0]) > 0
        return torch.cat([from_the_front(true), from_the_front(found.float())])

    def finish(self) -> tuple[BaseModel, dict[str, Tensor]]:
        """Adds the statistics of the latents: of the weights that are kept, on batches of the training split."""
        device = next(self.model.parameters()).device
        batches = self.batches(self.config, self.config.split, device)

        def latents(item: int) -> Tensor:
            batch = to_device(batches[item], device)
            occupancy = dense_occupancy(batch["coords"], batch["batch_size"], self.model_config.grid_size)
            return self.model.encode(occupancy)[0].transpose(0, 1).flatten(1)

        mean, std = measure(latents)
        return self.model_config.model_copy(update={"latent_mean": mean, "latent_std": std}), self.model.state_dict()


def dense_occupancy(coords: Int[Tensor, "N 4"], batch_size: int, grid_size: int) -> Float[Tensor, "B 1 n n n"]:
    """Surface voxels (object, x, y, z) of a batch -> occupancy, `n = grid_size`."""
    b, x, y, z = coords.long().unbind(1)
    occupancy = torch.zeros(batch_size, 1, grid_size, grid_size, grid_size, device=b.device)
    occupancy[b, 0, x, y, z] = 1.0
    return occupancy


def from_the_front(occupancy: Float[Tensor, "B 1 n n n"]) -> Float[Tensor, "B 3 n n"]:
    """Grids as seen from -y: brightness is nearness of the first voxel, black where there is none."""
    depth = torch.linspace(1, 0.3, occupancy.shape[3], device=occupancy.device)[:, None]
    nearness = (occupancy[:, 0] * depth).amax(2)  # [B, x, z]
    return nearness.transpose(1, 2).flip(1)[:, None].expand(-1, 3, -1, -1)
