"""Mesh pictures without OpenGL: a z-buffer in numba. Unlit base colour, both sides."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field

from diff2to3.data._mesh import Mesh, MeshPart
from diff2to3.data._renderers._kernels import draw, resolve, shade

_NEAR = 0.05
_DEPTH_STEP = 4  # pixels between two values of depth


class CpuMeshRendererConfig(BaseModel):
    """How smooth the pictures are.

    Args:
        samples: along a side of a pixel; each has its own triangle and its own colour.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    samples: int = Field(default=3, ge=1, le=16)


class CpuMeshRenderer:
    """Draws on one core with numba; needs nothing else.

    A pixel is the mean of a square grid of samples. The texture of a sample comes, bilinearly, from the two levels of
    its pyramid that suit the distance to the next sample.
    """

    def __init__(self, config: CpuMeshRendererConfig) -> None:
        self.config = config

    def close(self) -> None:
        """Nothing is held."""

    def __call__(
        self, mesh: Mesh, world_to_camera: np.ndarray, intrinsics: np.ndarray, size: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Pictures and depth of a mesh: the role ``mesh_renderer``."""
        surfaces = _surfaces(mesh)
        images = _pictures(surfaces, world_to_camera, intrinsics, size, self.config.samples)
        return images, _depths(surfaces, world_to_camera, intrinsics, size)


def mesh_depth(mesh: Mesh, world_to_camera: np.ndarray, intrinsics: np.ndarray, size: int) -> np.ndarray:
    """The depth alone that a mesh renderer returns, for one whose pictures come from elsewhere."""
    return _depths(_surfaces(mesh), world_to_camera, intrinsics, size)


class _Surface(NamedTuple):
    """A part as the kernels take it."""

    vertices: np.ndarray  # [V, 3]
    arrays: tuple[np.ndarray, ...]
    has_holes: bool


def _surfaces(mesh: Mesh) -> list[_Surface]:
    pyramids: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    surfaces = []
    for part in mesh.parts:
        if id(part.texture) not in pyramids:
            pyramids[id(part.texture)] = _pyramid(part.texture)
        surfaces.append(_surface(part, *pyramids[id(part.texture)]))
    return surfaces


def _surface(part: MeshPart, smaller: np.ndarray, levels: np.ndarray) -> _Surface:
    uv = np.where(np.abs(part.uv) < 1e6, part.uv, 0).astype(np.float32)  # NaN, too: these become places of texels
    texels = np.ascontiguousarray(part.texture).reshape(-1, 4)
    has_holes = bool(part.colors[:, 3].min() < 255 or texels[:, 3].min() < 255)
    arrays = (np.ascontiguousarray(part.faces, np.int32), uv, np.ascontiguousarray(part.colors), texels)
    return _Surface(part.vertices, (*arrays, smaller, levels), has_holes)


def _pyramid(texture: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Texels [M, 4] of the copies of half the size, a quarter, ... down to one texel, and the levels [L, 3]."""
    height, width = texture.shape[:2]
    levels, copies, first = [(0, width, height)], [np.zeros((0, 4), np.uint8)], 0
    image = Image.fromarray(texture)
    while max(image.size) > 1:
        image = image.reduce(2)
        copies.append(np.asarray(image).reshape(-1, 4))
        levels.append((first, *image.size))
        first += len(copies[-1])
    return np.concatenate(copies), np.array(levels, np.int64)


class _Buffers:
    """The nearest triangle at every sample of a square: 1 / depth and number, as the kernel `draw` takes them.

    Args:
        size: samples along a side.
        step: pixels from one sample to the next; the first is half a step inside the picture.
    """

    def __init__(self, size: int, step: float) -> None:
        self.nearest, self.owner = np.empty((size, size), np.float32), np.empty((size, size), np.int32)
        self.to_samples = np.array([[1 / step, 0, -0.5], [0, 1 / step, -0.5], [0, 0, 1]])

    def draw(self, surfaces: list[_Surface], projection: np.ndarray) -> list[tuple[np.ndarray, Any, int]]:
        """Fills them; returns every surface's homogeneous sample coordinates, box, and number of its first triangle.

        Args:
            projection: world to homogeneous pixels [3, 4].
        """
        self.nearest[:], self.owner[:] = 0, -1
        matrix = self.to_samples @ projection
        placed, first_id = [], 0
        for surface in surfaces:
            points = surface.vertices @ matrix[:, :3].T + matrix[:, 3]
            box = draw(points, surface.arrays, surface.has_holes, _NEAR, first_id, self.nearest, self.owner)
            placed.append((points, box, first_id))
            first_id += len(surface.arrays[0])
        return placed


def _pictures(
    surfaces: list[_Surface], world_to_camera: np.ndarray, intrinsics: np.ndarray, size: int, samples: int
) -> np.ndarray:
    """RGBA uint8 [V, size, size, 4], straight alpha."""
    images = np.empty((len(world_to_camera), size, size, 4), np.uint8)
    buffers, total = _Buffers(size * samples, 1 / samples), np.empty((size, size, 3), np.float32)
    for image, pose, matrix in zip(images, world_to_camera, intrinsics, strict=True):
        placed = buffers.draw(surfaces, matrix @ pose[:3])
        total[:] = 0
        for surface, (points, box, first_id) in zip(surfaces, placed, strict=True):
            shade(points, surface.arrays, box, first_id, buffers.owner, samples, total)
        resolve(buffers.owner, samples, total, image)
    return images


def _depths(surfaces: list[_Surface], world_to_camera: np.ndarray, intrinsics: np.ndarray, size: int) -> np.ndarray:
    """float32 [V, size / 4, size / 4]: depth at the centre of each 4 x 4 pixels, ``inf`` where there is nothing."""
    side = size // _DEPTH_STEP
    depths, buffers = np.empty((len(world_to_camera), side, side), np.float32), _Buffers(side, _DEPTH_STEP)
    for depth, pose, matrix in zip(depths, world_to_camera, intrinsics, strict=True):
        buffers.draw(surfaces, matrix @ pose[:3])
        depth[:] = np.where(buffers.nearest > 0, 1 / np.maximum(buffers.nearest, 1e-30), np.inf)
    return depths
