"""The training loop, on Hugging Face Accelerate; what is trained is a :class:`Stage`."""

from __future__ import annotations

import json
import math
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from pydantic import BaseModel
from sparse_vae import SparseTensor
from torch import Tensor, nn

from diff2to3.train._checkpoint import Trained, load_state, read_weights, save_model, save_state
from diff2to3.train._config import TrainConfig
from diff2to3.train._optimizer import make_optimizers

Batch = dict[str, Any]


class Batches(Protocol):
    """Item ``step`` is the whole batch of that step, a function of (seed, step) alone.

    That makes resuming trivial: the run continues with item ``step``. It is on the training device, or on the CPU when
    it was streamed.
    """

    def __getitem__(self, step: int) -> Batch: ...


class Stage(Trained):
    """One thing to train: a ``model`` with its loss. Frozen helpers are other submodules with ``requires_grad`` off."""

    model_config: BaseModel

    def batches(self, config: TrainConfig, split: str, device: torch.device) -> Batches:
        """The data of a split; raises LookupError if that is empty."""
        raise NotImplementedError("abstract: a stage says what it trains on")

    def prepare(self, batch: Batch) -> None:
        """Derives from a batch what its forward needs and what would make the host wait for the device there."""

    def static_modules(self) -> list[nn.Module]:
        """Modules whose input shapes are the same in every step, so that compiling them pays."""
        return []

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and figures to log, of a batch already on the device."""
        raise NotImplementedError("abstract: a stage says what it minimises")

    def finish(self) -> tuple[BaseModel, dict[str, Tensor]]:
        """Config and weights to keep, called once with the averaged weights in ``model``."""
        return self.model_config, self.model.state_dict()


class Schedule:
    """Learning rate and end of a run as functions of progress: the share of steps or of minutes spent, if larger."""

    def __init__(self, config: TrainConfig) -> None:
        self.config = config

    def progress(self, step: int, seconds: float) -> float:
        budget = self.config.max_minutes
        return min(1.0, max(step / self.config.steps, seconds / (budget * 60) if budget else 0.0))

    def learning_rate(self, step: int, seconds: float) -> float:
        """Linear warm-up, then a cosine down to ``final_learning_rate`` of the peak."""
        floor = self.config.final_learning_rate
        cosine = floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * self.progress(step, seconds)))
        warm = min(1.0, (step + 1) / max(1, self.config.warmup_steps))
        return self.config.learning_rate * warm * cosine


def train(stage: Stage, config: TrainConfig, resume: bool = False) -> dict[str, float]:
    """Runs a stage to the end of its schedule and writes ``config.out/model``; returns the last logged figures."""
    accelerator = Accelerator(
        mixed_precision="bf16" if config.precision == "bf16" else "no", cpu=config.device == "cpu"
    )
    torch.manual_seed(config.seed)
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True  # picture and grid sizes stay the same for a whole run
    if config.init is not None:
        stage.model.load_state_dict(read_weights(config.init))
    stage.to(accelerator.device)
    if config.compile and accelerator.device.type == "cuda":
        for module in stage.static_modules():
            module.compile()
    parameters = [p for p in stage.model.parameters() if p.requires_grad]
    optimizers = make_optimizers(stage.model, config, fused=accelerator.device.type == "cuda")
    average = torch.optim.swa_utils.AveragedModel(stage.model, multi_avg_fn=_ema(config.ema_decay), use_buffers=False)
    checkpoint = config.out / "checkpoint"
    step, spent = 0, 0.0
    if resume and checkpoint.is_dir():
        meta = load_state(checkpoint, stage, average, optimizers)
        step, spent = meta["step"], meta["seconds"]
        accelerator.print(f"resumed {checkpoint} at step {step}")
    wrapped, *steppers = accelerator.prepare(stage, *optimizers)
    schedule, log = Schedule(config), _Log(config.out, accelerator.is_main_process)
    batches, validation = (
        stage.batches(config, config.split, accelerator.device),
        _validation_batch(stage, config, accelerator),
    )
    rank, ranks = accelerator.process_index, accelerator.num_processes
    if config.is_streaming:
        batches = ReadAhead(batches, accelerator.device, ranks, config.workers)
    ahead = _Ahead(stage, batches, accelerator.device)
    ahead.prepare(step * ranks + rank)  # reads the data into memory, so that the clock does not count it
    started, figures = time.monotonic() - spent, {}
    while step < config.steps:
        batch = ahead.take()
        seconds = time.monotonic() - started
        rate = schedule.learning_rate(step, seconds)
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = rate
        loss, values = wrapped(batch)
        accelerator.backward(loss)
        norm = accelerator.clip_grad_norm_(parameters, config.gradient_clip)
        for stepper in steppers:
            stepper.step()
            stepper.zero_grad(set_to_none=True)
        ahead.prepare((step + 1) * ranks + rank)
        average.update_parameters(stage.model)
        step += 1
        done = schedule.progress(step, seconds) >= 1
        if step % config.log_every == 0 or step == 10 or done:
            figures = {"loss": float(loss.detach()), "norm": float(norm)} | {
                k: float(v.detach()) for k, v in values.items()
            }
            if not math.isfinite(figures["loss"]):
                raise RuntimeError(
                    f"step {step}: the loss is {figures['loss']}; the last checkpoint is in {checkpoint}"
                )
            log(step, seconds, {"rate": rate} | figures)
        if validation is not None and (step % config.validate_every == 0 or done):
            figures |= _validate(stage, average, validation, config, accelerator)
            log(step, seconds, {k: v for k, v in figures.items() if k.startswith("val_")})
        if (step % config.checkpoint_every == 0 or done) and accelerator.is_main_process:
            meta = {"step": step, "seconds": time.monotonic() - started}
            save_state(checkpoint, stage, average, optimizers, meta)
        if done:
            break
    if accelerator.is_main_process:
        stage.model.load_state_dict(average.module.state_dict())
        stage.eval()
        with torch.no_grad():
            save_model(config.out / "model", *stage.finish())
    return figures


class ReadAhead:
    """Items of batches that are read from disk, made by threads before they are asked for and moved to a device.

    Args:
        batches: make their items on the CPU.
        device: where items are wanted.
        stride: items are asked for in steps of it (the number of processes).
        workers: threads; twice as many items are made ahead, which bounds the memory.
    """

    def __init__(self, batches: Batches, device: torch.device, stride: int, workers: int) -> None:
        self.batches, self.device, self.stride, self.depth = batches, device, stride, 2 * workers
        self.pool = ThreadPoolExecutor(workers, thread_name_prefix="read-ahead")
        self.made: dict[int, Future[Batch]] = {}

    def __getitem__(self, index: int) -> Batch:
        due = range(index, index + self.stride * self.depth, self.stride)
        for stale in self.made.keys() - set(due):
            self.made.pop(stale).cancel()
        for item in due:
            if item not in self.made:
                self.made[item] = self.pool.submit(self.batches.__getitem__, item)
        return to_device(self.made.pop(index).result(), self.device)


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with its tensors on a device."""
    return {k: v.to(device) if isinstance(v, (Tensor, SparseTensor)) else v for k, v in batch.items()}


class _Ahead:
    """The next batch, prepared on a stream of its own while the device still works on this one.

    Sizes of sparse batches reach the host while they are made. On the main stream each such read would wait for all
    work in the queue, and the device would then wait for the host.
    """

    def __init__(self, stage: Stage, batches: Batches, device: torch.device) -> None:
        self.stage, self.batches = stage, batches
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.batch: Batch = {}
        self.used: tuple[torch.cuda.Event, Batch] | None = None

    def prepare(self, index: int) -> None:
        """Makes item ``index``; called when all work on the item taken last is in the queue."""
        if self.stream is None:
            self.batch = self._make(index)
            return
        if self.used is not None:  # memory of the item before the last is reused here: the device is done with it first
            self.used[0].wait(self.stream)
        finished = torch.cuda.Event()
        finished.record()
        self.used = finished, self.batch
        with torch.cuda.stream(self.stream):
            self.batch = self._make(index)

    def take(self) -> Batch:
        """The prepared item, on the main stream."""
        if self.stream is not None:
            torch.cuda.current_stream().wait_stream(self.stream)
        return self.batch

    def _make(self, index: int) -> Batch:
        with torch.no_grad():
            batch = self.batches[index]
            self.stage.prepare(batch)
        return batch


def _ema(decay: float):
    @torch.no_grad()
    def update(averaged: list[Tensor], current: list[Tensor], count: Tensor | int) -> None:
        warm = min(decay, (1 + int(count)) / (10 + int(count)))
        torch._foreach_lerp_(averaged, current, 1 - warm)

    return update


def _validation_batch(stage: Stage, config: TrainConfig, accelerator: Accelerator) -> Batch | None:
    try:
        batch = stage.batches(config, "val", accelerator.device)[0]
    except LookupError:  # a data set without a validation split
        return None
    batch = to_device(batch, accelerator.device)
    stage.prepare(batch)
    return batch


@torch.no_grad()
def _validate(
    stage: Stage,
    average: torch.optim.swa_utils.AveragedModel,
    batch: Batch,
    config: TrainConfig,
    accelerator: Accelerator,
) -> dict[str, float]:
    """Figures of one fixed validation batch under the averaged weights; its seed keeps the noise the same."""
    kept = stage.model
    stage.model, stage.training = average.module, False
    try:
        with accelerator.autocast():
            loss, values = stage(batch)
    finally:
        stage.model, stage.training = kept, True
    return {f"val_{k}": float(v) for k, v in ({"loss": loss.detach()} | values).items()}


class _Log:
    """A line a report on stdout, and the same as JSON lines in ``out/log.jsonl``."""

    def __init__(self, out: Path, active: bool) -> None:
        self.active, self.path = active, out / "log.jsonl"
        if active:
            out.mkdir(parents=True, exist_ok=True)

    def __call__(self, step: int, seconds: float, figures: dict[str, float]) -> None:
        if not self.active:
            return
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, "seconds": round(seconds, 1)} | figures) + "\n")
        text = "  ".join(f"{k} {v:.4g}" for k, v in figures.items())
        print(f"step {step}  {seconds:.0f} s  {step / max(seconds, 1e-9):.1f} it/s  {text}", flush=True)
