"""Voxel scenes for the tests of sparse_vae."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file


def sphere(radius: float, grid_size: int, centre: float | None = None) -> torch.Tensor:
    """Voxels [L, 3] on the surface of a sphere, roughly as dense as those of a real object."""
    voxels = torch.cartesian_prod(*[torch.arange(grid_size)] * 3)
    centre = (grid_size - 1) / 2 if centre is None else centre
    distance = (voxels - centre).square().sum(dim=1).sqrt()
    return voxels[(distance - radius).abs() < 0.5]


def random_voxels(count: int, grid_size: int, seed: int) -> torch.Tensor:
    """Distinct voxels [count, 3] in random order."""
    cells = torch.randperm(grid_size**3, generator=torch.Generator().manual_seed(seed))[:count]
    return torch.stack([cells // grid_size**2, cells // grid_size % grid_size, cells % grid_size], dim=1)


@pytest.fixture
def objects() -> list[torch.Tensor]:
    """Three objects on a 16-grid: a large surface, a small one, scattered voxels."""
    return [sphere(6, 16), sphere(2, 16, centre=4.5), random_voxels(40, 16, seed=0)]


@pytest.fixture
def surface() -> Callable[..., torch.Tensor]:
    return sphere


@pytest.fixture
def scattered() -> Callable[..., torch.Tensor]:
    return random_voxels


@pytest.fixture(autouse=True)
def _one_thread():
    """These tensors are so small that threads would only wait for each other, worst on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class GoldenCase:
    """Inputs, weights and outputs of one module of the reference implementation."""

    def __init__(self, folder: Path, name: str):
        self.description = json.loads((folder / f"{name}.json").read_text())
        self.tensors = load_file(folder / f"{name}.safetensors")
        self.kwargs = self.description["kwargs"]

    def group(self, prefix: str) -> dict[str, torch.Tensor]:
        return {k.removeprefix(prefix): v for k, v in self.tensors.items() if k.startswith(prefix)}

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.tensors[name]

    @property
    def trellis(self) -> dict:
        return {"name": self.description["class"], "args": self.kwargs}

    def close(self, actual: torch.Tensor, name: str) -> None:
        """Compare within the tolerance of the golden notes."""
        torch.testing.assert_close(actual, self[name], atol=1e-4, rtol=1e-4)


@pytest.fixture
def golden_cases(golden_dir) -> Callable[[str], list[GoldenCase]]:
    """All cases whose name starts with a prefix; fails when there is none."""

    def find(prefix: str) -> list[GoldenCase]:
        names = sorted(path.stem for path in golden_dir.glob(f"{prefix}*.safetensors"))
        assert names, f"no golden case {prefix}* in {golden_dir}"
        return [GoldenCase(golden_dir, name) for name in names]

    return find
