"""The training loop, on Hugging Face Accelerate; what is trained is a :class:`Stage`."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import broadcast
from torch import Tensor

from diff2to3._atomic import writing
from diff2to3._errors import InputError
from diff2to3._guards import device_memory_error
from diff2to3.train._ahead import Ahead, ReadAhead
from diff2to3.train._average import Average, Clip
from diff2to3.train._checkpoint import read_weights, save_model
from diff2to3.train._config import TrainConfig
from diff2to3.train._learning import Learning
from diff2to3.train._log import Log, Meter, count_flops, peak_flops
from diff2to3.train._optimizer import make_optimizers
from diff2to3.train._parallel import (
    gather_back,
    gather_root,
    make_accelerator,
    recompute_blocks,
    shard,
    unsynchronised,
    whole,
)
from diff2to3.train._stage import Batch, Stage, to_device
from diff2to3.train._state import Checkpoints
from diff2to3.train._stop import Stop


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


def train(
    stage: Stage, config: TrainConfig, resume: bool = False, on_step: Callable[[int], None] | None = None
) -> dict[str, float]:
    """Runs a stage to the end of its schedule and writes ``config.out/model``; returns the last logged figures.

    Args:
        stage: built for `config`.
        config: settings.
        resume: go on from the last checkpoint of ``config.out``, if there is one.
        on_step: called with the number of steps done after each of them.

    Raises:
        SystemExit, KeyboardInterrupt: the process was told to end, by SIGTERM or Ctrl-C; the run is saved. The second
            one ends it at once.
        DeviceMemoryError: a step does not fit into the device's memory.
    """
    run = _Run(stage, config, resume)
    try:
        with run.stop.listening():
            run.to_the_end(on_step)
    except torch.OutOfMemoryError as error:
        where = f"step {run.step + 1}"
        raise device_memory_error(run.accelerator.device, where, error, _what_to_lower(config)) from error
    finally:
        run.close()
    return run.figures


def _what_to_lower(config: TrainConfig) -> list[str]:
    size = f"batch_size ({config.batch_size})" if config.max_voxels is None else f"max_voxels ({config.max_voxels})"
    ways = [f"a lower {size} and more to accumulate ({config.accumulate})"]
    ways += [] if config.gradient_checkpointing else ["gradient_checkpointing: true"]
    return [*ways, "precision: bf16"] if config.precision == "fp32" else ways


class _Run:
    """A stage with all that changes while it trains.

    Items are dealt out in turn: of R processes, process r takes items next + r, next + r + R, ... of a step's
    R * accumulate. So a step's items depend on that product alone, not on how it is made up.
    """

    def __init__(self, stage: Stage, config: TrainConfig, resume: bool) -> None:
        self.stage, self.config = stage, config
        half = config.precision == "bf16-weights"
        if half and (not stage.has_half_weights or config.sharding != "none"):
            raise InputError("precision: bf16-weights is for the flows, without sharding; take bf16")
        self.accelerator = make_accelerator(config)
        device = self.accelerator.device
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.benchmark = True  # picture and grid sizes stay the same for a whole run
        if config.init is not None:
            stage.model.load_state_dict(read_weights(config.init))
        stage.to(device)
        self.batches = stage.batches(config, config.split, device)
        flops = self._flops()
        if config.gradient_checkpointing:
            recompute_blocks(stage.model)
        if config.compile and device.type == "cuda":
            stage.compile_parts(half)
        is_sharded = config.sharding == "fsdp2"
        if is_sharded:
            shard(stage, self.accelerator)
        self.learning = Learning(stage.model, half)
        self.optimizers = make_optimizers(self.learning, config, fused=device.type == "cuda")
        self.wrapped = stage if is_sharded else self.accelerator.prepare(stage)
        self.steppers = [self.accelerator.prepare(optimizer) for optimizer in self.optimizers]
        self.average = Average(self.learning, config.ema_decay)
        parameters = list(self.learning.parameters.values())
        self.clip = Clip(parameters, config.gradient_clip, config.clip_percentile, config.clip_window, device)
        self.checkpoints = Checkpoints(config.out, config.keep_checkpoints, self.accelerator)
        self.step, self.item, spent = 0, 0, 0.0
        if resume:
            meta = self.checkpoints.load(self.learning, self.average, self.optimizers, self.clip)
            if meta is not None:
                self.step, self.item, spent = meta["step"], meta["item"], meta["seconds"]
                self.accelerator.print(f"resumed at step {self.step}")
        self.stop = Stop(self.accelerator)
        self.schedule, self.log = Schedule(config), Log(config, self.accelerator)
        self.validation = _validation_batch(stage, config, device)
        self.read_ahead: ReadAhead | None = None
        if config.is_streaming:
            self.batches = self.read_ahead = ReadAhead(self.batches, device, self._following, config.workers)
        self.ahead = Ahead(stage, self.batches, device)
        self.next = self.item + self.accelerator.process_index
        if self.schedule.progress(self.step, spent) < 1:
            self.ahead.prepare(self.next)  # reads the data into memory, so that the clock does not count it
        self.clock = _Clock(self.accelerator, spent, shared=config.max_minutes is not None)
        self.meter = Meter(flops, self.accelerator)
        self.figures: dict[str, float] = {}

    def to_the_end(self, on_step: Callable[[int], None] | None = None) -> None:
        """All steps that are left, and the model folder."""
        config, done = self.config, self.schedule.progress(self.step, self.clock.read()) >= 1
        while not done:
            seconds = self.clock.read(self.step)
            rate = self.schedule.learning_rate(self.step, seconds)
            loss, values, norm = self._update(rate)
            self.step += 1
            done = self.schedule.progress(self.step, seconds) >= 1
            if self.step % config.log_every == 0 or self.step == 10 or done:
                self._report(seconds, rate, loss, norm, values)
            if self.validation is not None and (self.step % config.validate_every == 0 or done):
                self._validate(seconds, self.validation)
            if config.sample_every is not None and (self.step % config.sample_every == 0 or done):
                self._sample()
            stopped = not done and self.stop.is_asked(self.step)
            if config.checkpoint_every is not None and (self.step % config.checkpoint_every == 0 or done or stopped):
                self._save()
            if on_step is not None:
                on_step(self.step)
            if stopped:
                self.stop.leave(self.step)
        self._finish()

    def _save(self) -> None:
        meta = {"step": self.step, "item": self.item, "seconds": self.clock.read()}
        gather_back(self.stage)
        self.checkpoints.save(self.learning, self.average, self.optimizers, self.clip, meta)

    def close(self) -> None:
        """Ends the threads and the trackers."""
        if self.read_ahead is not None:
            self.read_ahead.close()
        self.accelerator.end_training()
        AcceleratorState._reset_state(reset_partial_state=True)  # so that another run can have other settings

    def _update(self, rate: float) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """A step of the optimizers: loss and figures of its last batch, length of the gradient."""
        for group in (group for optimizer in self.optimizers for group in optimizer.param_groups):
            group["lr"] = rate
        count, losses = self.config.accumulate, []
        for turn in range(count):
            batch = self.ahead.take()
            # What draws from the global generator (dropout of somebody's model) repeats in a resumed run as well.
            torch.manual_seed(batch["seed"])
            is_last = turn == count - 1
            # Masters take the gradients of every batch, in float32, so each has to be the mean over the processes.
            with nullcontext() if is_last or self.learning.masters else unsynchronised(self.wrapped):
                loss, values = self._backward(batch)
            if not is_last:
                self._prepare_next()
            losses.append(loss.detach())
            self.meter.count(batch)
        norm = self.clip()
        for stepper in self.steppers:
            stepper.step()
            stepper.zero_grad(set_to_none=True)
        self.learning.give_weights()
        self._prepare_next()
        self.average.update()
        self.meter.steps += 1
        self.item += count * self.accelerator.num_processes
        return torch.stack(losses).mean(), values, norm

    def _backward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        with self.accelerator.autocast():
            loss, values = self.wrapped(batch)
        self.accelerator.backward(loss / self.config.accumulate)
        self.learning.take_gradients()
        return loss, values

    def _following(self, item: int) -> int:
        """This process's item after one: the items are those of its number, modulo the number of processes."""
        return item + self.accelerator.num_processes

    def _prepare_next(self) -> None:
        self.next = self._following(self.next)
        self.ahead.prepare(self.next)

    def _report(self, seconds: float, rate: float, loss: Tensor, norm: Tensor, values: dict[str, Tensor]) -> None:
        """Logs figures, means over the processes; all of them stop when one's loss is not finite."""
        names = ["loss", *values]
        stacked = torch.stack([loss, *values.values()]).detach().float()
        means = self.accelerator.reduce(stacked, "mean").tolist()  # waits for the device, so that the speed is true
        self.figures = {**dict(zip(names, means, strict=True)), "norm": float(norm)}
        if not math.isfinite(self.figures["loss"]):
            raise RuntimeError(
                f"step {self.step}: the loss is {self.figures['loss']}; checkpoints are in {self.checkpoints.folder}"
            )
        self.log(self.step, seconds, {"rate": rate} | self.figures | self.meter.read())

    def _validate(self, seconds: float, batch: Batch) -> None:
        """Figures of one fixed batch under the averaged weights; its seed keeps the noise the same."""
        with _evaluating(self):
            loss, values = self.stage(batch)
        found = {f"val_{k}": float(v) for k, v in ({"loss": loss} | values).items()}
        self.figures |= found
        self.log(self.step, seconds, found)

    def _sample(self) -> None:
        batch = self.validation or to_device(self.batches[self.next], self.accelerator.device)
        with _evaluating(self):
            pictures = self.stage.sample(batch)
        if pictures is not None:
            self.log.pictures(self.step, pictures)

    @torch.no_grad()
    def _finish(self) -> None:
        """Writes the model folder; the averaged weights stay in the model."""
        stage = self.stage
        self.accelerator.wait_for_everyone()
        gather_back(stage)
        self.average.swap()
        stage.eval()
        gather_root(stage)
        config, weights = stage.finish()
        gather_back(stage)
        gathered = {name: whole(value) for name, value in self.learning.whole(weights).items()}
        if self.accelerator.is_main_process:
            with writing(self.config.out / "model"):
                save_model(self.config.out / "model", config, gathered)

    def _flops(self) -> float | None:
        """What `count_flops` finds for the first batch, on devices whose speed is known."""
        if peak_flops(self.accelerator.device) is None:
            return None
        batch = to_device(self.batches[0], self.accelerator.device)
        self.stage.prepare(batch)
        try:
            with self.accelerator.autocast():
                return count_flops(self.stage, batch)
        except torch.OutOfMemoryError:  # the plain implementations need more
            return None


class _Clock:
    """Seconds of a run. Where they decide about learning rate and end, all processes go by the main one's."""

    EVERY = 10  # steps between two looks at the main process's

    def __init__(self, accelerator: Accelerator, spent: float, shared: bool) -> None:
        self.accelerator = accelerator
        self.shared = shared and accelerator.num_processes > 1
        self.start = time.monotonic() - spent
        self.agreed = spent

    def read(self, step: int | None = None) -> float:
        """At a step, the same in all processes; without one, this process's."""
        seconds = time.monotonic() - self.start
        if step is None or not self.shared:
            return seconds
        if step % self.EVERY == 0:
            told = torch.tensor([seconds], dtype=torch.float64, device=self.accelerator.device)
            self.agreed = float(broadcast(told))
        return self.agreed


@contextmanager
def _evaluating(run: _Run) -> Iterator[None]:
    """The averaged weights in the model, not learning, for as long as the block lasts."""
    stage = run.stage
    gather_back(stage)
    stage.training = False
    stage.model.eval()
    try:
        with torch.no_grad(), run.accelerator.autocast(), run.average.in_place():
            gather_root(stage)
            yield
            gather_back(stage)
    finally:
        stage.training = True
        stage.model.train()


def _validation_batch(stage: Stage, config: TrainConfig, device: torch.device) -> Batch | None:
    try:
        batch = stage.batches(config, "val", device)[0]
    except LookupError:  # a data set without a validation split
        return None
    batch = to_device(batch, device)
    stage.prepare(batch)
    return batch
