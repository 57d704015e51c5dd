"""Contracts of matting, renderer and mesh renderer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from gs_render import Camera, Gaussians
from PIL import Image, ImageDraw
from torch import Tensor

from diff2to3._plugins import MATTING, MESH_RENDERER, RENDERER
from diff2to3.data._mesh import Mesh, MeshPart
from diff2to3.data._views import Views, orbit
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


class MeshRendererContract(ComponentContract):
    """For the role ``mesh_renderer``. Colours are compared where nothing shades a surface, within 5 %."""

    role = MESH_RENDERER
    size = 32

    def run(self, component: Any, seeds: Sequence[int]) -> list[list[Tensor]]:
        """The views of one mesh, a seed being an azimuth; pictures, and depth with 0 for background."""
        views = self.views([40.0 * seed for seed in seeds])
        scene = self.mesh([((-0.3, 0.2), 0.1, (200, 60, 40, 255)), ((-0.1, 0.35), -0.2, (30, 90, 220, 255))])
        images, depth = component(scene, views.world_to_camera, views.intrinsics, self.size)
        depth = np.where(np.isfinite(depth), depth, 0)
        return [[torch.from_numpy(i), torch.from_numpy(d)] for i, d in zip(images, depth, strict=True)]

    def views(self, azimuths: Sequence[float]) -> Views:
        """Level cameras at distance 2 that see 0.73 of the world at the origin in each direction."""
        angles = np.array(azimuths, np.float64)
        return orbit(angles, angles * 0, angles * 0 + 2.0, angles * 0 + 40.0, self.size)

    def mesh(self, squares: Sequence[tuple[tuple[float, float], float, tuple[int, int, int, int]]]) -> Mesh:
        """Upright squares ``((least, largest x and z), y, RGBA)``, a part each."""
        parts = []
        for (low, high), y, color in squares:
            corners = np.array([(low, y, low), (high, y, low), (high, y, high), (low, y, high)], np.float32)
            faces = np.array([(0, 1, 2), (0, 2, 3)], np.int32)
            colors, texture = np.array([color] * 4, np.uint8), np.full((1, 1, 4), 255, np.uint8)
            parts.append(MeshPart(corners, faces, np.zeros((4, 2), np.float32), texture, colors))
        return Mesh(tuple(parts))

    def test_shapes_and_types(self, component: Any) -> None:
        """RGBA uint8 [V, S, S, 4] and depth float32 [V, S/4, S/4]; no colour where alpha is zero."""
        views = self.views([0, 50, 200])
        mesh = self.mesh([((-0.3, 0.3), 0.0, (200, 60, 40, 255))])
        images, depth = component(mesh, views.world_to_camera, views.intrinsics, self.size)
        shapes = (images.dtype, images.shape, depth.dtype, depth.shape)
        side = self.size // 4
        expected = (np.dtype(np.uint8), (3, self.size, self.size, 4), np.dtype(np.float32), (3, side, side))
        assert shapes == expected, f"pictures and depth are {shapes}, expected {expected}"
        assert bool((images[images[..., 3] == 0] == 0).all()), "colours remain where nothing is drawn"

    def test_a_square_is_where_it_should_be(self, component: Any) -> None:
        """Silhouette, colour and depth of a square that faces the camera, and that seen from behind."""
        mesh = self.mesh([((-0.3, 0.2), 0.1, (200, 60, 40, 255))])
        for azimuth, z in ((0.0, 2.1), (180.0, 1.9)):
            views = self.views([azimuth])
            [image], [depth] = component(mesh, views.world_to_camera, views.intrinsics, self.size)
            mirror = 1 if azimuth == 0 else -1
            rays = (np.arange(self.size) + 0.5 - self.size / 2) / float(views.intrinsics[0, 0, 0])
            inside = self._within(rays * z * mirror)[None] & self._within(-rays * z)[:, None]
            border = self._near(rays * z * mirror)[None] | self._near(-rays * z)[:, None]
            assert bool((image[..., 3] > 127)[inside & ~border].all()), "the square has holes"
            assert bool((image[..., 3] == 0)[~inside & ~border].all()), "something is drawn beside the square"
            error = np.abs(image[inside & ~border][:, :3] - np.array([200.0, 60.0, 40.0])).max()
            assert error < 0.05 * 255, f"its colour is off by {error:.0f} of 255"
            blocks = (np.arange(self.size // 4) * 4 + 2 - self.size / 2) / float(views.intrinsics[0, 0, 0])
            seen = self._within(blocks * z * mirror)[None] & self._within(-blocks * z)[:, None]
            sure = ~(self._near(blocks * z * mirror)[None] | self._near(-blocks * z)[:, None])
            assert bool(np.allclose(depth[seen & sure], z, atol=2e-3)), f"its depth is not {z}"
            assert bool(np.isinf(depth[~seen & sure]).all()), "depth of the background is not infinite"

    @staticmethod
    def _within(x: np.ndarray) -> np.ndarray:
        return (x > -0.3) & (x < 0.2)

    @staticmethod
    def _near(x: np.ndarray) -> np.ndarray:
        """Places within a pixel of the square's edges."""
        return (np.abs(x + 0.3) < 0.05) | (np.abs(x - 0.2) < 0.05)

    def test_the_nearer_square_hides_the_other(self, component: Any) -> None:
        """Whatever the order in which they are drawn; one with alpha below one half is not there."""
        front, back = ((-0.3, 0.3), -0.2, (30, 90, 220, 255)), ((-0.3, 0.3), 0.2, (200, 60, 40, 255))
        hole = ((-0.3, 0.3), -0.3, (0, 255, 0, 100))
        views = self.views([0])
        for squares in ([front, back, hole], [hole, back, front]):
            mesh = self.mesh(squares)
            [image], [depth] = component(mesh, views.world_to_camera, views.intrinsics, self.size)
            middle = image[self.size // 2, self.size // 2]
            error = np.abs(middle - np.array([30.0, 90.0, 220.0, 255.0])).max()
            assert error < 0.05 * 255, f"the middle shows {middle}, expected the square in front"
            assert abs(depth[self.size // 8, self.size // 8] - 1.8) < 2e-3, (
                "the depth is not that of the square in front"
            )
