"""What a run tells: lines on stdout, JSON lines, trackers, sheets of pictures, and how fast it is."""

from __future__ import annotations

import hashlib
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor

from diff2to3.train._config import TrainConfig
from diff2to3.train._stage import Batch, Stage, num_voxels

PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40": 181e12, "4090": 165e12}
"""Dense bfloat16 operations a second, by a part of the device's name (data sheets)."""


class Log:
    """A line a report on stdout, the same as JSON lines in ``out/log.jsonl``, and in the trackers."""

    def __init__(self, config: TrainConfig, accelerator: Accelerator) -> None:
        self.out, self.accelerator, self.active = config.out, accelerator, accelerator.is_main_process
        self._complained = False
        if self.active:
            self.out.mkdir(parents=True, exist_ok=True)
        if config.trackers:
            settings = {k: v if isinstance(v, bool | int | float) else str(v) for k, v in dict(config).items()}
            run = hashlib.blake2b(str(self.out.resolve()).encode(), digest_size=8).hexdigest()  # goes on when resumed
            wandb = {"name": self.out.name, "dir": str(self.out), "id": run, "resume": "allow"}
            accelerator.init_trackers("diff2to3", settings, {"wandb": wandb} if "wandb" in config.trackers else {})

    def __call__(self, step: int, seconds: float, figures: dict[str, float]) -> None:
        if not self.active:
            return
        line = json.dumps({"step": step, "seconds": round(seconds, 1)} | figures)
        self._write(lambda: _append(self.out / "log.jsonl", line + "\n"))
        text = "  ".join(f"{k} {v:.4g}" for k, v in figures.items())
        print(f"step {step}  {seconds:.0f} s  {text}", flush=True)
        if self.accelerator.trackers:
            self.accelerator.log(figures, step=step)

    def pictures(self, step: int, pictures: Tensor) -> None:
        """Writes a sheet of pictures [n, 3, H, W] in [0, 1] as ``out/samples/STEP.png``."""
        if not self.active:
            return
        sheet = _sheet(pictures)
        path = self.out / "samples" / f"{step:08d}.png"
        self._write(lambda: _save_sheet(sheet, path))
        for tracker in self.accelerator.trackers:
            order = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({"samples": sheet[None]}, step=step, **order)

    def _write(self, work: Any) -> None:
        """A full disk must not end a run: what was learned would be lost."""
        try:
            work()
        except OSError as error:
            if not self._complained:
                print(f"train: {self.out} takes no more reports ({error.strerror or error})", file=sys.stderr)
            self._complained = True


def _save_sheet(sheet: np.ndarray, path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(sheet).save(path)


def _append(path: Path, text: str) -> None:
    with path.open("a") as file:
        file.write(text)


def _sheet(pictures: Tensor) -> np.ndarray:
    """Pictures [n, 3, H, W] side by side in rows of eight, [rows H, columns W, 3] uint8."""
    array = (pictures.detach().float().clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    columns = min(8, len(array))
    blank = np.full_like(array[:1], 255).repeat(-len(array) % columns, axis=0)
    rows = np.concatenate([array, blank]).reshape(-1, columns, *array.shape[1:])
    return np.concatenate([np.concatenate(list(row), axis=1) for row in rows], axis=0)


class Meter:
    """Speed since it was last asked: steps and objects a second of all processes, use of the device, memory.

    Args:
        flops: floating-point operations of a step for every voxel of its batch (`count_flops`), or None.
        accelerator: which processes, and the device.
    """

    def __init__(self, flops: float | None, accelerator: Accelerator) -> None:
        self.flops, self.accelerator = flops, accelerator
        self.peak = peak_flops(accelerator.device)
        self._restart()

    def _restart(self) -> None:
        self.steps = self.objects = self.voxels = 0
        self.start = time.monotonic()

    def count(self, batch: Batch) -> None:
        """Adds a batch of this process."""
        self.objects += batch["batch_size"]
        self.voxels += num_voxels(batch)

    def read(self) -> dict[str, float]:
        """``it/s``, ``objects/s``, ``mfu`` (on known devices) and ``GiB``; call it once all work has ended."""
        spent = max(time.monotonic() - self.start, 1e-9)
        ranks = self.accelerator.num_processes
        figures = {"it/s": self.steps / spent, "objects/s": self.objects * ranks / spent}
        if self.flops is not None and self.peak is not None:
            figures["mfu"] = self.flops * self.voxels / spent / self.peak
        if self.accelerator.device.type == "cuda":
            figures["GiB"] = torch.cuda.max_memory_allocated() / 2**30
        self._restart()
        return figures


def peak_flops(device: torch.device) -> float | None:
    """Operations that a device can do in a second, in bfloat16; None of those not in `PEAK_FLOPS`."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((value for key, value in PEAK_FLOPS.items() if key in name), None)


@torch.no_grad()
def count_flops(stage: Stage, batch: Batch) -> float:
    """Floating-point operations of a training step for every voxel of its batch.

    Counted by PyTorch in a forward of the plain implementations, whose products and attention it sees; drawing is not
    counted. What learns counts three times (the backward takes twice the forward), what is frozen once; blocks that
    are computed again do not count again.
    """
    from marope import kernel_backend
    from sparse_vae import attention_backend, convolution_backend
    from torch.utils.flop_counter import FlopCounterMode

    with (
        FlopCounterMode(display=False) as counter,
        kernel_backend("torch"),
        convolution_backend("torch"),
        attention_backend("sdpa"),
    ):
        stage(batch)
    counts = counter.get_flop_counts()
    learns = sum(counts.get(f"{type(stage).__name__}.model", {}).values())
    return (sum(counts["Global"].values()) + 2 * learns) / num_voxels(batch)
