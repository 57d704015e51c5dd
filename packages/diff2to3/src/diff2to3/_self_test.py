"""A short run of every part of the embedded pipeline, compared with numbers that were stored when it was made.

    python -m diff2to3._self_test > src/diff2to3/_self_test.json     # after other weights were embedded

The inputs are formulas, so they are the same on every machine.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.resources import files
from typing import TypeVar

import torch
from gs_render import Camera
from sparse_vae import SparseTensor
from torch import Tensor

from diff2to3._device import synchronize
from diff2to3._pipeline import Pipeline

T = TypeVar("T")
TOLERANCE = 0.01
"""Share of the standard deviation by which rounding may move a figure elsewhere; a wrong kernel moves it more."""


@dataclass(frozen=True)
class Check:
    """One part's figures beside the stored ones.

    Attributes:
        name: of the part.
        values: mean and standard deviation of every tensor that was looked at.
        expected: the same as it was stored.
        seconds: how long it took.
    """

    name: str
    values: tuple[float, ...]
    expected: tuple[float, ...]
    seconds: float

    @property
    def error(self) -> float:
        """Largest difference over the stored standard deviation; infinite where a figure is missing or not finite."""
        if len(self.values) != len(self.expected) or not all(map(math.isfinite, self.values)):
            return math.inf
        deviations = [value for value in self.expected[1::2] for _ in range(2)]
        return max(abs(a - b) / d for a, b, d in zip(self.values, self.expected, deviations, strict=True))

    @property
    def passed(self) -> bool:
        """Whether the difference is one of rounding."""
        return self.error <= TOLERANCE


def self_test(device: str | None = None) -> Iterator[Check]:
    """Run the parts of the embedded pipeline one after the other.

    Args:
        device: where; None is CUDA where there is one, else Apple's MPS, else the CPU.
    """
    stored = json.loads(files("diff2to3").joinpath("_self_test.json").read_text())
    for name, values, seconds in _measure(Pipeline.from_pretrained(device=device)):
        yield Check(name, values, tuple(stored.get(name, ())), seconds)


@torch.no_grad()
def _measure(pipe: Pipeline) -> Iterator[tuple[str, tuple[float, ...], float]]:
    """Name, figures and seconds of every part."""
    config = pipe.backbone.config
    size = pipe.feature_extractor.image_size
    picture = _waves((1, 3, size, size)).mul(0.5).add(0.5).to(pipe.device)
    features, seconds = _timed(pipe.device, lambda: pipe.feature_extractor.tokens(pipe.feature_extractor(picture)))
    yield "features", _moments(features), seconds

    condition = features[:, None]
    coords = _ball(config.grid_size)
    noise = SparseTensor.from_coords([coords], [_waves((len(coords), config.latent_channels))], config.grid_size)
    noise = noise.to(pipe.device)
    t = torch.full((1,), 0.5, device=pipe.device)
    velocity, seconds = _timed(pipe.device, lambda: pipe.backbone(noise, t, condition))
    yield "flow", _moments(velocity.features), seconds

    voxels, seconds = _timed(pipe.device, lambda: pipe.structure.sample(condition, seeds=[0], steps=1))
    occupied = torch.zeros([config.grid_size] * 3)
    occupied[voxels[0].long().cpu().unbind(dim=1)] = 1
    yield "structure", (*_moments(occupied), *(value for axis in voxels[0].T for value in _moments(axis))), seconds

    [gaussians], seconds = _timed(pipe.device, lambda: pipe.latent_decoder(pipe.denormalise(noise)))
    figures = (gaussians.means, gaussians.scales.log(), gaussians.opacities, gaussians.sh)
    yield "gaussians", tuple(value for part in figures for value in _moments(part)), seconds

    cameras = Camera.orbit(num_views=1, radius=2.0, fov_degrees=40.0, size=64)
    view, seconds = _timed(pipe.device, lambda: pipe.renderer(gaussians, cameras))
    yield "picture", (*_moments(view.color), *_moments(view.alpha)), seconds


def _waves(shape: tuple[int, ...]) -> Tensor:
    """Values in [-1, 1] without a pattern that a model could ignore."""
    return torch.arange(math.prod(shape), dtype=torch.float64).mul(0.7390851).sin().float().view(shape)


def _ball(grid_size: int) -> Tensor:
    """Voxels [L, 3] of a shell in the middle of the grid."""
    grid = torch.cartesian_prod(*[torch.arange(grid_size)] * 3)
    distance = (grid - (grid_size - 1) / 2).square().sum(dim=1).sqrt()
    return grid[(distance - grid_size / 4).abs() < 0.6].int()


def _moments(x: Tensor) -> tuple[float, float]:
    x = x.cpu().double()  # MPS has no float64
    return x.mean().item(), x.std().item()


def _timed(device: torch.device, call: Callable[[], T]) -> tuple[T, float]:
    begin = time.perf_counter()
    result = call()
    synchronize(device)
    return result, time.perf_counter() - begin


if __name__ == "__main__":
    measured = _measure(Pipeline.from_pretrained(device="cpu"))
    print(json.dumps({name: [float(f"{value:.7g}") for value in values] for name, values, _ in measured}, indent=2))
