"""Contracts of matting and renderer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from gs_render import Camera, Gaussians
from PIL import Image, ImageDraw
from torch import Tensor

from diff2to3._plugins import MATTING, RENDERER
from diff2to3.testing._contract import ComponentContract, generator


class MattingContract(ComponentContract):
    """For the role ``matting``: cuts a coloured disc out of a plain background."""

    role = MATTING

    def run(self, component: Any, seeds: Sequence[int]) -> list[list[Tensor]]:
        return [[torch.from_numpy(np.array(component(self.picture(seed)[0])))] for seed in seeds]

    def picture(self, seed: int) -> tuple[Image.Image, np.ndarray]:
        """An RGB picture, and where its object is (bool [H, W])."""
        centre, radius = (70 + 5 * seed, 60), 35
        box = (centre[0] - radius, centre[1] - radius, centre[0] + radius, centre[1] + radius)
        image, mask = Image.new("RGB", (160, 120), (240, 240, 235)), Image.new("1", (160, 120))
        ImageDraw.Draw(image).ellipse(box, fill=(160, 40, 30 + 20 * seed))
        ImageDraw.Draw(mask).ellipse(box, fill=1)
        return image, np.array(mask)

    def test_cuts_the_object_out(self, component: Any) -> None:
        """RGBA of the same size; the object is opaque and the background transparent, by 95 % of the pixels."""
        image, mask = self.picture(1)
        out = component(image)
        assert out.mode == "RGBA", f"the result is {out.mode}, expected RGBA"
        assert out.size == image.size, f"the result is {out.size}, expected {image.size}"
        agreement = float(((np.array(out)[..., 3] > 127) == mask).mean())
        assert agreement > 0.95, f"only {agreement:.0%} of the pixels are on the right side"

    def test_input_is_not_changed(self, component: Any) -> None:
        """The picture that is given stays as it is."""
        image, _ = self.picture(1)
        before = image.copy()
        component(image)
        assert image == before, "the input picture was changed"


class RendererContract(ComponentContract):
    """For the role ``renderer``."""

    role = RENDERER
    size = 24

    @torch.no_grad()
    def run(self, component: Any, seeds: Sequence[int]) -> list[list[Tensor]]:
        """The views of one scene, a seed being an azimuth: views must not influence each other."""
        cameras = Camera.on_sphere([40.0 * seed for seed in seeds], size=self.size)
        out = component(self.scene(), cameras, 1.0)
        return [list(view) for view in zip(out.color, out.alpha, out.depth, strict=True)]

    def scene(self) -> Gaussians:
        """Thirty Gaussians in the unit cube."""
        source = generator(0)
        return Gaussians(
            means=(torch.rand(30, 3, generator=source) - 0.5) * 0.8,
            scales=0.02 + 0.08 * torch.rand(30, 3, generator=source),
            quaternions=torch.nn.functional.normalize(torch.randn(30, 4, generator=source), dim=-1),
            opacities=0.2 + 0.7 * torch.rand(30, generator=source),
            sh=torch.randn(30, 1, 3, generator=source),
        )

    def test_shapes_and_background(self, component: Any) -> None:
        """color [V, H, W, 3], alpha and depth [V, H, W, 1]; where alpha is 0 the background shows."""
        cameras = Camera.orbit(num_views=2, size=self.size)
        out = component(self.scene(), cameras, 0.25)
        side = (2, self.size, self.size)
        shapes = [tuple(t.shape) for t in (out.color, out.alpha, out.depth)]
        assert shapes == [(*side, 3), (*side, 1), (*side, 1)], f"color, alpha and depth are {shapes}"
        empty = out.alpha[..., 0] < 1e-6
        assert bool(empty.any()), "nothing is transparent in a scene that does not fill the picture"
        assert torch.allclose(out.color[empty], torch.tensor(0.25), atol=1e-4), "the background does not show"

    def test_agrees_with_the_reference(self, component: Any) -> None:
        """The picture is that of gs_render's plain PyTorch renderer with the same filter, within 1e-3 on average."""
        from gs_render import render

        config = getattr(component, "config", None)
        options = {name: getattr(config, name) for name in ("filter_2d", "antialias") if hasattr(config, name)}
        cameras = Camera.orbit(num_views=3, size=self.size)
        expected = render(self.scene(), cameras, 1.0, "torch", **options).color
        error = float((component(self.scene(), cameras, 1.0).color - expected).abs().mean())
        assert error < 1e-3, f"the picture differs from the reference by {error:.2e} on average"
