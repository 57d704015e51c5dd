"""Random scenes for the tests of gs_render."""

from collections.abc import Callable

import pytest
import torch
from gs_render import Gaussians

FIELDS = ("means", "scales", "quaternions", "opacities", "sh")


def random_gaussians(
    count: int, seed: int = 0, degree: int = 0, scale: tuple[float, float] = (0.005, 0.1)
) -> Gaussians:
    """Gaussians in the unit box, scales log-uniform between the bounds (world units)."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=generator)

    low, high = torch.tensor(scale).log()
    sh = torch.randn(count, (degree + 1) ** 2, 3, generator=generator) * 0.3
    return Gaussians(
        means=uniform(count, 3) - 0.5,
        scales=(low + (high - low) * uniform(count, 3)).exp(),
        quaternions=torch.randn(count, 4, generator=generator),
        opacities=0.02 + 0.97 * uniform(count),
        sh=sh,
    )


@pytest.fixture
def make_gaussians() -> Callable[..., Gaussians]:
    return random_gaussians


@pytest.fixture
def leaves() -> Callable[..., Gaussians]:
    """The same Gaussians as leaves of a new graph, optionally in another dtype."""

    def copy(gaussians: Gaussians, dtype: torch.dtype = torch.float32) -> Gaussians:
        values = {name: getattr(gaussians, name).detach().to(dtype).clone().requires_grad_() for name in FIELDS}
        return Gaussians(**values)

    return copy
