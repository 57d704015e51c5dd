"""Training configuration: one YAML file a stage, every key settable with ``--set key=value``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from diff2to3._settings import load_settings
from diff2to3.data._objects import is_packed


class TrainConfig(BaseModel):
    """What the engine needs, and what it hands to a stage.

    Attributes:
        data: data set folder (``diff2to3 data``), or the folder of its shards (``diff2to3 data pack``).
        streaming: read a batch's objects from disk when they are due, instead of holding the split in memory on the
            device that trains; the batches are the same. Default: for shards yes, for a data set folder no.
        workers: threads that read ahead when streaming, up to two batches each.
        out: run folder; the trained model lands in ``out/model``.
        model: ``{preset: name, ...}`` with any field of the stage's model config overridden.
        init: model folder whose weights the training starts from; random ones without it.
        parts: checkpoints that the stage builds on, by role (``features``, ``vae``, ``structure_vae``).
        options: settings of the stage itself (loss weights, augmentation).
        steps: length of the schedule.
        max_minutes: wall-clock budget; the schedule ends there if that comes before ``steps``.
        batch_size: objects (or pictures) a step and process; with ``max_voxels`` the most that a batch may have.
        max_voxels: objects are packed into batches of at most so many voxels, so that memory stays the same from step
            to step; larger objects are left out.
        accumulate: batches a step and process whose gradients are averaged; the global batch is this times the number
            of processes.
        sharding: "fsdp2" splits parameters, gradients, averages and optimizer states over the processes; "none" keeps
            all of them in each (DDP). Checkpoints are the same, and either goes on from the other's.
        gradient_checkpointing: blocks are computed again in the backward instead of keeping what is inside them.
        compile: torch.compile on CUDA for what sees the same shapes in every step; takes half a minute at the start.
        precision: "bf16" computes products in bfloat16 by autocast. "bf16-weights" (flows): the model's own weights are
            bfloat16 and the optimizer steps float32 masters of them, which spares the casts of every product; with
            ``compile`` its blocks are compiled besides.
        optimizer: "muon" updates the matrices inside the blocks by Muon and the rest by AdamW.
        gradient_clip: the longest gradient.
        clip_percentile: adaptive clipping: the longest gradient is besides this percentile of the last ``clip_window``
            (TRELLIS: 95 of 1000); None leaves it out.
        ema_decay: of the weights that are kept; warmed up as (1 + step) / (10 + step).
        sample_every: steps between sheets of pictures of what the averaged weights make, ``out/samples``; None: none.
        trackers: "tensorboard" (files in ``out/tensorboard``) and "wandb" get the figures and the sheets.
        checkpoint_every: steps between two checkpoints, one at the end besides; None: none at all.
        keep_checkpoints: the last so many stay; a damaged one falls back to the one before.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    data: Path
    out: Path
    model: dict[str, Any] = Field(default_factory=dict)
    init: Path | None = None
    parts: dict[str, Path] = Field(default_factory=dict)
    options: dict[str, Any] = Field(default_factory=dict)
    streaming: bool | None = None
    workers: int = Field(default=4, ge=1)
    split: str = "train"
    max_objects: int | None = None
    seed: int = 0
    steps: int = Field(default=10_000, ge=1)
    max_minutes: float | None = Field(default=None, gt=0)
    batch_size: int = Field(default=32, ge=1)
    max_voxels: int | None = Field(default=None, ge=1)
    accumulate: int = Field(default=1, ge=1)
    sharding: Literal["none", "fsdp2"] = "none"
    gradient_checkpointing: bool = False
    optimizer: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = Field(default=1e-4, gt=0)
    warmup_steps: int = Field(default=200, ge=0)
    final_learning_rate: float = Field(default=0.02, ge=0, le=1)
    weight_decay: float = Field(default=0.01, ge=0)
    gradient_clip: float = Field(default=1.0, gt=0)
    clip_percentile: float | None = Field(default=None, gt=0, le=100)
    clip_window: int = Field(default=1000, ge=1)
    ema_decay: float = Field(default=0.9999, ge=0, lt=1)
    precision: Literal["fp32", "bf16", "bf16-weights"] = "bf16"
    compile: bool = False
    device: str | None = None
    log_every: int = Field(default=50, ge=1)
    validate_every: int = Field(default=500, ge=1)
    sample_every: int | None = Field(default=None, ge=1)
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ()
    checkpoint_every: int | None = Field(default=2000, ge=1)
    keep_checkpoints: int = Field(default=2, ge=1)

    @property
    def is_streaming(self) -> bool:
        """Whether batches are read from disk when they are due."""
        return is_packed(self.data) if self.streaming is None else self.streaming


def load_config(path: Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """The configuration in a YAML file, see `load_settings`."""
    return load_settings(path, overrides, TrainConfig)
