"""What fewer model calls cost in quality: validation objects, stage by stage, with the embedded pipeline on the CPU.

    python benchmarks/sampling.py DATA ASSETS --stage 1 [--seed 0]
    python benchmarks/sampling.py DATA ASSETS --stage 2

DATA is made of ASSETS by `diff2to3 data voxelize ASSETS DATA --split val --rule sampled` and `diff2to3 data render`.
Stage 2 fills the voxels that the pipeline's own stage 1 finds. One thread, so that CPU seconds count arithmetic alone.
"""

# ruff: noqa: E402
from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).parent]  # holds smdit.py

import torch
from diff2to3 import Pipeline
from diff2to3.data._store import Store
from diff2to3.eval._generation import evaluate_generation, pipeline_maker
from diff2to3.eval._protocol import Protocol, freeze_protocol
from diff2to3.eval._scores import summary
from diff2to3.eval._truth import draw_truth
from smdit import SamplerConfig
from torch import nn

FIGURES = {1: ("f-score", "voxel iou"), 2: ("psnr", "psnr_foreground", "ssim", "novel psnr", "novel ssim")}


def settings(stage: int) -> list[SamplerConfig]:
    """The samplers to compare: Euler's 25 steps with guidance all along, then less and less of it."""
    guidance = {1: 2.0, 2: 1.0}[stage]
    begins = {1: (0.0, 0.5, 0.7, 0.85), 2: (0.0, 0.5, 0.7)}[stage]
    return [
        SamplerConfig(steps=25, guidance=guidance),
        *(SamplerConfig(method="multistep", steps=12, guidance=guidance, interval=(low, 1.0)) for low in begins),
        SamplerConfig(method="multistep", steps=10, guidance=guidance, interval=({1: 0.7, 2: 0.5}[stage], 1.0)),
        SamplerConfig(method="multistep", steps=8, guidance=guidance, interval=({1: 0.7, 2: 0.5}[stage], 1.0)),
    ]


class Calls:
    """Counts the objects that a model is called for, and its CPU seconds."""

    def __init__(self, model: nn.Module) -> None:
        self.count, self.seconds, self._begin = 0, 0.0, 0.0
        model.register_forward_pre_hook(self._before)
        model.register_forward_hook(self._after)

    def _before(self, model: nn.Module, inputs: tuple[Any, ...]) -> None:
        self.count += len(inputs[1])  # times, one an object
        self._begin = time.process_time()

    def _after(self, model: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        self.seconds += time.process_time() - self._begin


def measure(stage: int, sampler: SamplerConfig, store: Store, protocol: Protocol, seed: int) -> list[str]:
    """A row of the table."""
    pipe = Pipeline.from_pretrained(device="cpu")
    if stage == 1:  # a single step of stage 2, which says nothing about voxels
        pipe.structure.config = pipe.structure.config.model_copy(update={"sampler": sampler})
        sampler = SamplerConfig(steps=1, guidance=0.0)
    pipe.config = pipe.config.model_copy(update={"sampler": sampler})
    calls = Calls(pipe.structure.flow if stage == 1 else pipe.backbone)
    found = summary(evaluate_generation(pipeline_maker(pipe, seed=seed), store, protocol).objects)
    count = len(protocol.objects)
    figures = [f"{found[name]['mean']:.4f}" if stage == 1 else f"{found[name]['mean']:.3f}" for name in FIGURES[stage]]
    return [f"{calls.count / count:.0f}", f"{calls.seconds / count:.2f}", *figures]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("assets", type=Path)
    parser.add_argument("--stage", type=int, choices=(1, 2), required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="one row, by its number from 0")
    options = parser.parse_args()
    torch.set_num_threads(1)
    store = Store(options.data)
    protocol = freeze_protocol(store, "val", 64)  # what `eval generation` takes; every other one is enough here
    protocol = protocol.model_copy(update={"objects": protocol.objects[::2]})
    draw_truth(store, options.assets, protocol)
    names = ["solver", "steps", "guided from", "calls", "CPU s", *FIGURES[options.stage]]
    print("| " + " | ".join(names) + " |\n" + "|---" * len(names) + "|")
    for number, sampler in enumerate(settings(options.stage)):
        if options.only in (None, number):
            row = measure(options.stage, sampler, store, protocol, options.seed)
            print("| " + " | ".join([sampler.method, f"{sampler.steps}", f"t = {sampler.interval[0]:g}", *row]) + " |")


if __name__ == "__main__":
    main()
