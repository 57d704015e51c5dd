"""What is trained: a :class:`Stage`, and what it reads."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from pydantic import BaseModel
from sparse_vae import SparseTensor
from torch import Tensor, nn

from diff2to3.train._config import TrainConfig

Batch = dict[str, Any]
"""Tensors by name; ``batch_size`` is the number of its objects, and all its noise follows from ``seed``."""


class Batches(Protocol):
    """Item ``index`` is a whole batch, a function of (seed, index) alone.

    That makes resuming trivial: the run continues with the next item. It is on the training device, or on the CPU when
    it was streamed.
    """

    def __getitem__(self, index: int) -> Batch: ...


class Stage(nn.Module):
    """One thing to train: a ``model`` with its loss. Frozen helpers are other submodules with ``requires_grad`` off."""

    model: nn.Module
    model_config: BaseModel
    has_half_weights = False
    """Whether the model is called as a whole and takes float32 when its weights are bfloat16."""

    def batches(self, config: TrainConfig, split: str, device: torch.device) -> Batches:
        """The data of a split; raises LookupError if that is empty."""
        raise NotImplementedError("abstract: a stage says what it trains on")

    def prepare(self, batch: Batch) -> None:
        """Derives from a batch what its forward needs and what would make the host wait for the device there."""

    def compile_parts(self, half: bool) -> None:
        """Lets PyTorch compile what that pays for; `half`: the model's weights are bfloat16, without autocast."""

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and figures to log, of a batch already on the device."""
        raise NotImplementedError("abstract: a stage says what it minimises")

    def sample(self, batch: Batch) -> Tensor | None:
        """Pictures [n, 3, H, W] in [0, 1] of what the model makes of a batch, beside what was asked for."""
        return None

    def finish(self) -> tuple[BaseModel, dict[str, Tensor]]:
        """Config and weights to keep, called once with the averaged weights in ``model``."""
        return self.model_config, self.model.state_dict()


def num_voxels(batch: Batch) -> int:
    """Voxels of a batch; of one without any, its objects."""
    found = (value for value in batch.values() if isinstance(value, SparseTensor))
    return next((len(value.features) for value in found), batch["batch_size"])


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with its tensors on a device."""
    return {k: v.to(device) if isinstance(v, (Tensor, SparseTensor)) else v for k, v in batch.items()}
