"""Contracts of the models: feature extractor, structure, backbone, latent decoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from gs_render import Gaussians
from sparse_vae import SparseTensor
from torch import Tensor

from diff2to3._plugins import BACKBONE, FEATURE_EXTRACTOR, LATENT_DECODER, STRUCTURE
from diff2to3.testing._contract import ComponentContract, device_of, generator


class FeatureExtractorContract(ComponentContract):
    """For the role ``feature_extractor``."""

    role = FEATURE_EXTRACTOR

    @torch.no_grad()
    def run(self, component: Any, seeds: Sequence[int]) -> list[list[Tensor]]:
        size = component.image_size
        images = torch.stack([torch.rand(3, size, size, generator=generator(seed)) for seed in seeds])
        images = images.to(device_of(component))
        features = component(images)
        outputs = [features, component.tokens(features)]
        if hasattr(component, "condition"):
            outputs.append(component.condition(images))
        return [list(row) for row in zip(*outputs, strict=True)]

    def test_shapes(self, component: Any) -> None:
        """Feature maps are [B, channels, size / stride, size / stride], tokens [B, rows, columns, channels], float."""
        component.eval()
        [[features, tokens, *condition]] = self.run(component, [1])
        side = component.image_size // component.stride
        expected = (component.channels, side, side)
        assert tuple(features.shape) == expected, f"feature map is {list(features.shape)}, expected {list(expected)}"
        assert features.is_floating_point(), f"feature map is {features.dtype}, expected a float type"
        assert tokens.ndim == 3, f"tokens of one image are {list(tokens.shape)}, expected [rows, columns, channels]"
        for given in condition:
            assert given.ndim == 3, f"condition of one image is {list(given.shape)}, expected [rows, columns, channels]"
            assert given.shape[-1] == tokens.shape[-1], f"condition has {given.shape[-1]} channels, tokens have others"

    @torch.no_grad()
    def test_sees_the_image(self, component: Any) -> None:
        """Another image gives other features."""
        component.eval()
        [a, *_], [b, *_] = self.run(component, [1, 2])
        assert not torch.equal(a, b), "two different images gave the same features"


class StructureContract(ComponentContract):
    """For the role ``structure``. The component must find some voxels, but not all, for random tokens."""

    role = STRUCTURE
    tokens_side = 4

    def run(self, component: Any, seeds: Sequence[int]) -> list[list[Tensor]]:
        shape = (1, self.tokens_side, self.tokens_side, component.condition_channels)
        condition = torch.stack([torch.randn(shape, generator=generator(seed)) for seed in seeds])
        return [[voxels] for voxels in component.sample(condition.to(device_of(component)), seeds=list(seeds), steps=2)]

    def test_voxels(self, component: Any) -> None:
        """Voxels are int32 [L, 3], inside the grid, each once."""
        [[voxels]] = self.run(component, [1])
        assert voxels.ndim == 2, f"voxels are {list(voxels.shape)}, expected [L, 3]"
        assert voxels.shape[1] == 3, f"voxels are {list(voxels.shape)}, expected [L, 3]"
        assert voxels.dtype == torch.int32, f"voxels are {voxels.dtype}, expected int32"
        assert bool(((voxels >= 0) & (voxels < component.grid_size)).all()), "voxels lie outside the grid"
        assert len(voxels.unique(dim=0)) == len(voxels), "a voxel is listed twice"

    def test_progress_and_steps(self, component: Any) -> None:
        """`callback` is told every step and `steps` is obeyed."""
        shape = (1, 1, self.tokens_side, self.tokens_side, component.condition_channels)
        seen: list[tuple[int, int]] = []
        condition = torch.zeros(shape, device=device_of(component))
        component.sample(condition, seeds=[0], steps=3, callback=lambda done, total: seen.append((done, total)))
        assert seen == [(1, 3), (2, 3), (3, 3)], f"callback was told {seen}"

    def test_seed_matters(self, component: Any) -> None:
        """The same condition with other seeds gives another result."""
        shape = (1, 1, self.tokens_side, self.tokens_side, component.condition_channels)
        condition = torch.randn(shape, generator=generator(0)).to(device_of(component)).expand(2, -1, -1, -1, -1)
        a, b = component.sample(condition, seeds=[1, 2], steps=2)
        assert not torch.equal(a, b), "two seeds gave the same voxels"


class BackboneContract(ComponentContract):
    """For the role ``backbone``."""

    role = BACKBONE
    tokens_side = 4

    @torch.no_grad()
    def run(self, component: Any, seeds: Sequence[int]) -> list[list[Tensor]]:
        x = _voxels(seeds, component.config.grid_size, component.config.latent_channels).to(device_of(component))
        shape = (1, self.tokens_side, self.tokens_side, component.config.condition_channels)
        condition = torch.stack([torch.randn(shape, generator=generator(seed)) for seed in seeds]).to(x.device)
        times = torch.tensor([0.2 + 0.3 * (seed % 3) for seed in seeds], device=x.device)
        out = component(x, times, condition)
        assert out.topology is x.topology, "the velocity lies on another topology than its input"
        return [[rows] for rows in out.split(out.features)]

    def test_shapes(self, component: Any) -> None:
        """The velocity has the shape of the latents."""
        [[velocity]] = self.run(component, [1])
        channels = component.config.latent_channels
        assert velocity.shape[1] == channels, f"velocity has {velocity.shape[1]} channels, expected {channels}"
        assert velocity.is_floating_point()


class LatentDecoderContract(ComponentContract):
    """For the role ``latent_decoder``."""

    role = LATENT_DECODER

    @torch.no_grad()
    def run(self, component: Any, seeds: Sequence[int]) -> list[list[Tensor]]:
        z = _voxels(seeds, component.config.grid_size, component.config.latent_channels).to(device_of(component))
        return [[g.means, g.scales, g.quaternions, g.opacities, g.sh] for g in component(z)]

    def test_gaussians_are_activated(self, component: Any) -> None:
        """Scales are positive, opacities in [0, 1], quaternions of length above zero, centres near the unit cube."""
        component.eval()
        [[means, scales, quaternions, opacities, sh]] = self.run(component, [1])
        Gaussians(means=means, scales=scales, quaternions=quaternions, opacities=opacities, sh=sh).validate()
        assert bool((scales > 0).all()), "scales must be positive: they are activated values"
        assert bool(((opacities >= 0) & (opacities <= 1)).all()), (
            "opacities must lie in [0, 1]: they are activated values"
        )
        assert float(means.abs().max()) <= 1.0, "centres lie far outside [-0.5, 0.5]^3"


def _voxels(seeds: Sequence[int], grid_size: int, channels: int) -> SparseTensor:
    """A few dozen random voxels a seed, another number for each, with normal features."""
    coords, features = [], []
    for seed in seeds:
        source = generator(seed)
        cells = torch.randperm(grid_size**3, generator=source)[: 24 + 5 * (seed % 4)]
        x, y, z = cells // grid_size**2, cells // grid_size % grid_size, cells % grid_size
        coords.append(torch.stack([x, y, z], dim=1).int())
        features.append(torch.randn(len(cells), channels, generator=source))
    return SparseTensor.from_coords(coords, features, grid_size)
