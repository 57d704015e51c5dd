"""How many model calls each solver needs: distance from the converged solution of stage 2, with the embedded pipeline.

    python benchmarks/solvers.py [--device cuda] [--picture PICTURE] [--out benchmarks/results/solvers.md]

Voxels, noise and picture are the same for all. "Converged" is the multistep solver with many more steps than the table.
"""

# ruff: noqa: E402
from __future__ import annotations

import argparse
import platform
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).parent]  # holds smdit.py

import torch
from diff2to3 import Pipeline
from gs_render import Camera, render
from smdit import EulerSampler, HeunSampler, MultistepSampler
from torch import Tensor

PICTURE = Path(__file__).parents[1] / "examples" / "chair.png"
CONVERGED = MultistepSampler(steps=160)
RUNS = {EulerSampler: (6, 12, 25, 50), HeunSampler: (3, 6, 12, 25), MultistepSampler: (6, 12, 25, 50)}


class Counter:
    """A model that counts its calls."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model, self.calls = model, 0

    def __call__(self, *arguments):
        self.calls += 1
        return self.model(*arguments)


@torch.no_grad()
def measure(pipe: Pipeline, picture: Path, guidance: float) -> Iterator[list[str]]:
    condition = pipe.encode([[pipe.cut_out(picture)]])
    voxels = pipe.structure.sample(condition, seeds=[0])
    noise = pipe.initial_noise(voxels, seed=0)
    cameras = Camera.orbit(num_views=8, size=256)

    def run(sampler: EulerSampler) -> tuple[int, Tensor, Tensor]:
        counter = Counter(pipe.backbone)
        latents = sampler.sample(counter, noise, condition)
        [gaussians] = pipe.latent_decoder(pipe.denormalise(latents))
        return counter.calls, latents.features, render(gaussians, cameras).color

    def sampler(build: type[EulerSampler], steps: int) -> EulerSampler:
        return build(steps=steps, guidance=guidance)

    _, exact, views = run(sampler(type(CONVERGED), CONVERGED.steps))
    for build, counts in RUNS.items():
        for steps in counts:
            calls, latents, drawn = run(sampler(build, steps))
            distance = (latents - exact).norm() / exact.norm()
            psnr = -10 * (drawn - views).square().mean().log10()
            yield [build.__name__, f"{steps}", f"{calls}", f"{distance:.4f}", f"{psnr:.1f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--picture", type=Path, default=PICTURE)
    parser.add_argument("--out", type=Path, help="write the table to this file as well")
    arguments = parser.parse_args()
    pipe = Pipeline.from_pretrained(device=arguments.device)
    guidance = pipe.config.sampler.guidance
    machine = torch.cuda.get_device_name() if arguments.device == "cuda" else f"{platform.machine()} CPU"
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    lines = [
        "# Solvers of stage 2\n",
        f"`python benchmarks/solvers.py --device {arguments.device}`: {machine}; torch {version('torch')}; "
        f"commit {commit.stdout.strip() or 'unknown'}.\n",
        f"Pipeline tiny, {arguments.picture.name}, seed 0, guidance {guidance:g}. Distance of the latents from "
        f"the converged ones ({CONVERGED.steps} multistep steps), relative; PSNR of 8 views from theirs, in dB.\n",
        "| solver | steps | model calls | distance | PSNR |",
        "| --- | --- | --- | --- | --- |",
    ]
    print("\n".join(lines))
    for row in measure(pipe, arguments.picture, guidance):
        lines.append("| " + " | ".join(row) + " |")
        print(lines[-1], flush=True)
    if arguments.out:
        arguments.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
