"""Features without weights: the lowest frequencies of 8 x 8 blocks, as in JPEG."""

import math

import torch
from pydantic import BaseModel, ConfigDict
from torch import nn


class DctFeaturesConfig(BaseModel):
    """image_size: side of the condition image, pixels; luma, chroma: coefficients kept of each."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    image_size: int = 256
    luma: int = 10
    chroma: int = 3


class DctFeatures(nn.Module):
    """[B, 3, H, W] in [0, 1] -> [B, luma + 2 chroma, H/8, W/8], the discrete cosine transform of every block."""

    stride = 8

    def __init__(self, config: DctFeaturesConfig) -> None:
        super().__init__()
        self.config = config
        self.image_size = config.image_size
        self.channels = config.luma + 2 * config.chroma
        n = torch.arange(8)
        waves = torch.cos(math.pi / 8 * (n[None] + 0.5) * n[:, None]) / 8
        order = sorted(((u, v) for u in range(8) for v in range(8)), key=lambda uv: (sum(uv), uv))
        blocks = torch.stack([torch.outer(waves[u], waves[v]) for u, v in order])[:, None]
        colour = torch.tensor([[0.299, 0.587, 0.114], [-0.169, -0.331, 0.5], [0.5, -0.419, -0.081]])
        self.register_buffer("blocks", blocks, persistent=False)
        self.register_buffer("colour", colour, persistent=False)

    def forward(self, images):
        images = 4 * (images - 1)  # nothing on the white ground, and of size 1 elsewhere: what flows are used to
        planes = torch.einsum("ij,bjhw->bihw", self.colour, images).split(1, dim=1)
        kept = (self.config.luma, self.config.chroma, self.config.chroma)
        maps = [
            nn.functional.conv2d(plane, self.blocks[:count], stride=8)
            for plane, count in zip(planes, kept, strict=True)
        ]
        return torch.cat(maps, dim=1)

    def tokens(self, feature_map):
        return nn.functional.pixel_unshuffle(feature_map, 2).permute(0, 2, 3, 1)
