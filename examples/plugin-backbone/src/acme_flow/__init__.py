"""A flow without attention: a voxel sees itself, the mean of its object and the mean of the picture (a deep set)."""

import torch
from pydantic import BaseModel, ConfigDict
from torch import nn


class DeepSetFlowConfig(BaseModel):
    """latent_channels, condition_channels, grid_size: of the pipeline; width: hidden channels; depth: blocks."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    latent_channels: int = 8
    condition_channels: int = 64
    grid_size: int = 32
    width: int = 128
    depth: int = 4


class DeepSetFlow(nn.Module):
    """Velocity of noisy latents `x` at times `t` [B], given tokens [B, images, rows, columns, channels]."""

    def __init__(self, config: DeepSetFlowConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.voxel = nn.Linear(config.latent_channels + 3, width)
        self.whole = nn.Linear(config.condition_channels + 1, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(2 * width), nn.Linear(2 * width, 2 * width), nn.SiLU(), nn.Linear(2 * width, width)
            )
            for _ in range(config.depth)
        )
        self.output = nn.Linear(width, config.latent_channels)

    def forward(self, x, t, condition):
        dtype = self.output.weight.dtype
        owner, places = x.topology.coords[:, 0].long(), x.topology.coords[:, 1:]
        places = (places + 0.5) / self.config.grid_size - 0.5
        whole = self.whole(torch.cat([condition.mean(dim=(1, 2, 3)), t[:, None]], dim=1).to(dtype))
        h = self.voxel(torch.cat([x.features.to(dtype), places.to(dtype)], dim=1))
        counts = torch.bincount(owner, minlength=len(t))[:, None].to(dtype)
        for block in self.blocks:
            mean = torch.zeros_like(whole).index_add(0, owner, h) / counts
            h = h + block(torch.cat([h, (whole + mean)[owner]], dim=1))
        return x.replace(self.output(h))
