"""Stage ``autoencoder``: the FLUX-shaped tiny autoencoder behind the features."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from flux_features import FluxFeatures, FluxFeaturesConfig
from pydantic import BaseModel
from torch import Tensor

from diff2to3.data._augment import hue_matrix, shift_hue
from diff2to3.train._batches import PictureBatches
from diff2to3.train._config import TrainConfig
from diff2to3.train._data import open_data
from diff2to3.train._stage import Batch, Batches, to_device
from diff2to3.train.stages._base import PictureStage, build_config, composite, generator_of, measure, on_white


class AutoencoderStage(PictureStage):
    """The FLUX-shaped tiny autoencoder: pictures in, the same pictures out."""

    model: FluxFeatures
    model_config: FluxFeaturesConfig

    def __init__(self, config: TrainConfig) -> None:
        super().__init__(config)
        self.config = config
        self.model_config = build_config(FluxFeaturesConfig, config.model)
        self.model = FluxFeatures(self.model_config).to(memory_format=torch.channels_last)

    def batches(self, config: TrainConfig, split: str, device: torch.device) -> Batches:
        return PictureBatches(open_data(config, split, ("render",), device))

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        generator = generator_of(batch)
        picture = self._pictures(batch, generator)
        latent = self.model(picture)
        # The first three channels are asked for the mean colour of their 8x8 pixels: left to itself so small a network
        # finds colour, a small share of the variance, only after thousands of steps.
        mean_color = F.avg_pool2d(picture, self.model.stride) * 2 - 1
        anchor = F.mse_loss(latent[:, :3].float(), mean_color)
        # A little noise in latent units keeps the latents smooth; the pull to unit scale fixes their free scale.
        noise = 0.05 * torch.randn(latent.shape, generator=generator, device=latent.device, dtype=latent.dtype)
        loss, figures = self.picture_loss(self.model.decode(latent + noise), picture)
        loss = loss + self.options.color_weight * anchor + 1e-3 * latent.float().square().mean()
        return loss, figures | {"color": anchor.detach(), "latent_std": latent.detach().float().std()}

    def _pictures(self, batch: Batch, generator: torch.Generator) -> Tensor:
        """Crops [B, 3, side, side] of the batch's pictures, their hue turned, mostly on white."""
        rgba = batch["image"]
        if self.options.crop:
            rgba = random_crop(rgba, self.options.crop, generator)
        rgba = rgba.float() / 255
        count = len(rgba)
        hue = torch.rand(count, generator=generator, device=rgba.device) * 360
        ground = torch.rand(count, 3, 1, 1, generator=generator, device=rgba.device)
        white = torch.rand(count, 1, 1, 1, generator=generator, device=rgba.device) < 0.7
        return composite(shift_hue(rgba[:, :3], hue_matrix(hue)), rgba[:, 3:], torch.where(white, 1.0, ground))

    def sample(self, batch: Batch) -> Tensor:
        """Pictures of the batch, and what the model makes of them."""
        picture = on_white(batch["image"][:8])
        return torch.cat([picture, self.model.decode(self.model(picture)).float()])

    def finish(self) -> tuple[BaseModel, dict[str, Tensor]]:
        """Adds the statistics of the latents: of the weights that are kept, on batches of the training split."""
        device = next(self.model.parameters()).device
        batches = self.batches(self.config, self.config.split, device)

        def latents(item: int) -> Tensor:
            batch = to_device(batches[item], device)
            return self.model(self._pictures(batch, generator_of(batch))).transpose(0, 1).flatten(1)

        mean, std = measure(latents)
        return self.model_config.model_copy(update={"channel_mean": mean, "channel_std": std}), self.model.state_dict()


def random_crop(pictures: Tensor, side: int, generator: torch.Generator) -> Tensor:
    """A square of each picture [B, C, H, W] at a random place, [B, C, side, side]."""
    count, _, height, width = pictures.shape
    device = pictures.device
    top, left = (torch.randint(n - side + 1, (count, 1), generator=generator, device=device) for n in (height, width))
    steps = torch.arange(side, device=device)
    rows, columns = (top + steps)[:, :, None], (left + steps)[:, None, :]
    return pictures[torch.arange(count, device=device)[:, None, None], :, rows, columns].permute(0, 3, 1, 2)
