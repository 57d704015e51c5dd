"""What every extractor does to pictures before its network."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def padded(images: Tensor, side: int) -> Tensor:
    """Pictures [B, 3, H, W], the bottom and right edge of which are repeated up to the next multiples of `side` pixels.

    Raises:
        ValueError: not such pictures.
    """
    if images.ndim != 4 or images.shape[1] != 3 or 0 in images.shape or not images.is_floating_point():
        raise ValueError(f"expected float images [B, 3, H, W] in [0, 1], got {images.dtype} {tuple(images.shape)}")
    bottom, right = -images.shape[-2] % side, -images.shape[-1] % side
    return F.pad(images, (0, right, 0, bottom), mode="replicate") if bottom or right else images
