"""A stand-in for stage 1, where stage 2 alone is compared."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Int
from torch import Tensor, nn


class KnownVoxels(nn.Module):
    """A structure that was told the voxels: what is compared is the second stage, on the same voxels in every row."""

    def __init__(self, condition_channels: int, grid_size: int) -> None:
        super().__init__()
        self.condition_channels, self.grid_size = condition_channels, grid_size
        self._told: list[Tensor] = []

    def tell(self, coords: list[Int[Tensor, "L 3"]]) -> None:
        """Voxels of the objects of the next batch."""
        self._told = coords

    def sample(
        self,
        condition: Tensor,
        *,
        seeds: Sequence[int],
        steps: int | None = None,
        guidance: float | None = None,
        callback: Callable[[int, int], None] | None = None,
    ) -> list[Int[Tensor, "L 3"]]:
        """What was told."""
        return [coords.to(condition.device, torch.int32) for coords in self._told]
