"""VGG16 features: wide and semantic, where DINOv2's weights cannot be had."""

from __future__ import annotations

from pathlib import Path

import torch.nn.functional as F
from gs_render.metrics import LPIPS
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from flux_features._images import padded


class VGGFeaturesConfig(BaseModel):
    """Which VGG16, and for which pictures.

    Attributes:
        source: safetensors file that :class:`gs_render.metrics.LPIPS` takes with ``backbone="vgg"``.
        image_size: side in pixels of the square condition image; a multiple of 16.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: Path
    image_size: int = Field(default=256, ge=16, le=4096, multiple_of=16)


class VGGFeatures(nn.Module):
    """VGG16's last convolution (relu5_3): 512 channels at 1/16 of the picture, trained to name objects.

    It stands in for DINOv2 in comparisons with autoencoder features: as those of DINOv2 its features are many, and of
    what is seen more than of how it looks. Results with it are to be called VGG's.

    Shapes: images ``[B, 3, H, W]`` float RGB in [0, 1]; feature map ``[B, 512, H / 16, W / 16]``, rounded up; what
    lies beyond the picture repeats its edge. Nothing is downloaded.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file holds other weights.
    """

    channels = 512
    stride = 16
    patch = 1
    shift: Tensor
    scale: Tensor

    def __init__(self, config: VGGFeaturesConfig) -> None:
        super().__init__()
        self.config = config
        trunk = LPIPS(config.source, "vgg")
        self.features = trunk.features
        self.register_buffer("shift", trunk.shift, persistent=False)
        self.register_buffer("scale", trunk.scale, persistent=False)
        self.eval()

    @property
    def image_size(self) -> int:
        """Side in pixels of the condition image."""
        return self.config.image_size

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B 512 h w"]:
        """Feature maps of images in [0, 1], not normalised."""
        images = padded(images, self.stride)
        dtype = next(self.features.parameters()).dtype
        return self.features(((images * 2 - 1 - self.shift) / self.scale).to(dtype))

    def tokens(self, feature_map: Float[Tensor, "B 512 h w"]) -> Float[Tensor, "B h w 512"]:
        """Condition tokens, one a cell, normalised over their channels as DINOv2's are."""
        tokens = feature_map.permute(0, 2, 3, 1)
        return F.layer_norm(tokens, tokens.shape[-1:])


def is_vgg(source: Path) -> bool:
    """Whether a file holds VGG16 in the layout that :class:`VGGFeatures` reads."""
    if source.suffix != ".safetensors" or not source.is_file():
        return False
    try:
        with safe_open(source, "pt") as file:
            return {"features.28.weight", "lin4.model.1.weight"} <= set(file.keys())
    except SafetensorError:
        return False
