"""Patches -> one mesh with one texture, soft light baked in (pictures of data sets are rendered unlit)."""

from __future__ import annotations

from typing import Any

import numpy as np

from diff2to3.data._procedural._patterns import trilinear
from diff2to3.data._procedural._surfaces import Patch

_ATLAS_WIDTH = 1024
_DENSITY = 400  # texels a world unit
_MARGIN = 2  # texels around a tile that repeat its border, against bleeding
_CELLS = 40  # of the grid that measures how closed in a place is, along the longest side
_LIGHT = np.array([-0.45, -0.62, 0.64])


def bake(patches: list[Patch]) -> Any:
    """A ``trimesh.Trimesh`` in glTF's frame (y up), textured by one atlas."""
    import trimesh
    from PIL import Image

    tiles = [_tile(patch) for patch in patches]
    corners, height = _pack(tiles)
    occlusion = _Occlusion(patches)
    atlas = np.full((height, _ATLAS_WIDTH, 3), 0.5)
    vertices, faces, uvs = [], [], []
    count = 0
    for patch, tile, (left, top) in zip(patches, tiles, corners, strict=True):
        points, normals, uv = patch.chart(*np.meshgrid(_ramp(tile[0]), _ramp(tile[1])))
        shade = _shade(normals) * (1 - 0.5 * occlusion(points, normals))
        atlas[top : top + tile[1], left : left + tile[0]] = patch.pattern(points, uv) * shade[..., None]
        s, t = np.meshgrid(patch.columns, patch.rows)
        points, normals, _ = patch.chart(s, t)
        vertices.append(points.reshape(-1, 3))
        faces.append(_grid_faces(points, normals) + count)
        across = left + _MARGIN + s * (tile[0] - 2 * _MARGIN)
        down = top + _MARGIN + t * (tile[1] - 2 * _MARGIN)
        uvs.append(np.stack([across / _ATLAS_WIDTH, 1 - down / height], -1).reshape(-1, 2))
        count += len(vertices[-1])
    image = Image.fromarray(np.rint(np.clip(atlas, 0, 1) * 255).astype(np.uint8))
    material = trimesh.visual.material.PBRMaterial(baseColorTexture=image, metallicFactor=0.0, roughnessFactor=1.0)
    points = np.concatenate(vertices)
    return trimesh.Trimesh(
        np.stack([points[:, 0], points[:, 2], -points[:, 1]], 1),
        np.concatenate(faces),
        visual=trimesh.visual.TextureVisuals(uv=np.concatenate(uvs), material=material),
        process=False,
    )


def _tile(patch: Patch) -> tuple[int, int]:
    """Width and height in texels that suit the patch's size along s and t."""
    points, _, _ = patch.chart(*np.meshgrid(np.linspace(0, 1, 9), np.linspace(0, 1, 9)))
    lengths = (float(np.linalg.norm(np.diff(points, axis=axis), axis=-1).sum(axis).max()) for axis in (1, 0))
    width, height = (8 + 2 * _MARGIN + min(int(length * _DENSITY), 500) // 8 * 8 for length in lengths)
    return width, height


def _ramp(side: int) -> np.ndarray:
    """Chart coordinates of the texels of a tile's side."""
    return np.clip((np.arange(side) - _MARGIN + 0.5) / (side - 2 * _MARGIN), 0, 1)


def _pack(tiles: list[tuple[int, int]]) -> tuple[list[tuple[int, int]], int]:
    """Left top corners of the tiles, in shelves from the tallest to the lowest, and the height of the atlas."""
    corners = [(0, 0)] * len(tiles)
    left = top = shelf = 0
    for index in sorted(range(len(tiles)), key=lambda i: -tiles[i][1]):
        width, height = tiles[index]
        if left + width > _ATLAS_WIDTH:
            left, top, shelf = 0, top + shelf, 0
        corners[index] = (left, top)
        left, shelf = left + width, max(shelf, height)
    return corners, top + shelf


def _shade(normals: np.ndarray) -> np.ndarray:
    """A soft key light from the front left and above, and a brighter sky than ground."""
    key = np.clip(normals @ (_LIGHT / np.linalg.norm(_LIGHT)), 0, 1)
    return 0.60 + 0.32 * key + 0.14 * (0.5 + 0.5 * normals[..., 2])


def _grid_faces(points: np.ndarray, normals: np.ndarray) -> np.ndarray:
    """Triangles [F, 3] of a grid of points [R, C, 3], counter-clockwise seen from where the normals point."""
    rows, columns = points.shape[:2]
    index = np.arange(rows * columns).reshape(rows, columns)
    a, b, c, d = index[:-1, :-1].ravel(), index[:-1, 1:].ravel(), index[1:, 1:].ravel(), index[1:, :-1].ravel()
    faces = np.concatenate([np.stack([a, b, c], 1), np.stack([a, c, d], 1)])
    corner = points.reshape(-1, 3)[faces]
    cross = np.cross(corner[:, 1] - corner[:, 0], corner[:, 2] - corner[:, 0])
    faces, cross = (array[np.linalg.norm(cross, axis=1) > 1e-12] for array in (faces, cross))
    if np.einsum("fd,fd->f", cross, normals.reshape(-1, 3)[faces[:, 0]]).sum() < 0:
        faces = faces[:, ::-1]
    return faces


class _Occlusion:
    """How much of the neighbourhood above a surface is taken by other surfaces, from a blurred grid of the object."""

    def __init__(self, patches: list[Patch]) -> None:
        ramp = np.linspace(0, 1, 48)
        cloud = np.concatenate([p.chart(*np.meshgrid(ramp, ramp))[0].reshape(-1, 3) for p in patches])
        low, high = cloud.min(0), cloud.max(0)
        self.cell = float((high - low).max()) / _CELLS
        self.origin = low - 6 * self.cell
        shape = np.ceil((high - low) / self.cell).astype(int) + 12
        self.density = np.zeros(shape)
        self.density[tuple(((cloud - self.origin) / self.cell).astype(int).T)] = 1.0
        for axis in range(3):
            for _ in range(2):
                self.density = np.mean([np.roll(self.density, k, axis) for k in range(-2, 3)], axis=0)

    def __call__(self, points: np.ndarray, normals: np.ndarray) -> np.ndarray:
        place = (points + 3.2 * self.cell * normals - self.origin) / self.cell - 0.5
        return np.clip((trilinear(self.density, place) - 0.05) / 0.2, 0, 1)
