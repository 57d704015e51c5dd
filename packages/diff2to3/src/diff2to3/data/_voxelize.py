"""Surface voxels of a mesh."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import numpy as np

from diff2to3.data._mesh import Mesh

Rule = Literal["exact", "sampled"]

_TRIANGLES = 2**15  # looked at together
_PAIRS = 2**15  # of a triangle and a box, tested together; an array of them fits into a processor's cache
_CORNERS = np.array([(x, y, z) for x in (0, 1) for y in (0, 1) for z in (0, 1)], np.int32)
_SAMPLES_PER_VOXEL = 4  # lattice spacing on a triangle, per voxel side
_BATCH_POINTS = 4_000_000


def voxelize(mesh: Mesh, grid_size: int, rule: Rule = "exact") -> np.ndarray:
    """Voxels that the surface passes through.

    Args:
        mesh: in world coordinates, inside [-0.5, 0.5]^3; a triangle may be a segment or a point.
        grid_size: N; voxel (i, j, k) has its centre at ((i, j, k) + 0.5) / N - 0.5.
        rule: ``"exact"``: voxels that hold a point of a triangle. A voxel holds its lower faces and not its upper ones,
            so a face exactly between two layers fills the upper one alone; the last layer also holds the border.
            ``"sampled"``: voxels that hold a point of a lattice on a triangle, a quarter of a voxel apart; some that
            the surface only clips are missed (5 % of the voxels that a sphere touches at N = 32).

    Returns:
        int32 ``[L, 3]``, lexicographically sorted, unique.

    Raises:
        ValueError: a triangle reaches out of the cube, or has a coordinate that is no number.
    """
    fill = {"exact": _fill_exact, "sampled": _fill_sampled}[rule]
    occupied = np.zeros((grid_size,) * 3, bool)
    for part in mesh.parts:
        for start in range(0, len(part.faces), _TRIANGLES):
            triangles = part.vertices[part.faces[start : start + _TRIANGLES]].astype(np.float64)
            if not (np.abs(triangles) <= 0.5).all():  # also false for NaN
                low, high = triangles.min((0, 1)).tolist(), triangles.max((0, 1)).tolist()
                raise ValueError(f"expected triangles inside [-0.5, 0.5]^3, got some that reach from {low} to {high}")
            fill(occupied, triangles)
    return np.argwhere(occupied).astype(np.int32)


def _fill_exact(occupied: np.ndarray, triangles: np.ndarray) -> None:
    """Marks the voxels of triangles [F, 3, 3] in world units.

    Boxes as large as a triangle are cut into eight as long as the triangle meets them, down to voxels: the work goes
    with the voxels found, not with a bounding box, and a short stack of small batches is all that is held.
    """
    grid_size = len(occupied)
    corners = triangles * grid_size  # exact: the factor is small and the coordinates are of float32
    cells = np.floor(corners + grid_size % 2 / 2).astype(np.int32) + grid_size // 2
    cells = np.clip(cells, 0, grid_size)  # the border has a layer of its own here, see `_mark`
    low, high = cells.min(1), cells.max(1)
    level = np.ceil(np.log2(np.maximum(high - low, 1).max(1))).astype(np.int32)  # at most two boxes along an axis
    stack = []
    for scale in np.unique(level).tolist():
        owner = np.flatnonzero(level == scale).astype(np.int32)
        stack += [(scale, *pairs) for pairs in _cut(owner, low[owner] >> scale << scale, low, high, scale)]
    while stack:
        scale, owner, box = stack.pop()
        if scale == 0:
            new = ~occupied[tuple(np.minimum(box, grid_size - 1).T)]
            owner, box = owner[new], box[new]
        # A triangle is connected: it meets every box that its bounding box meets if these are in one row.
        met = (high[owner] >> scale != low[owner] >> scale).sum(1) <= 1
        rest = np.flatnonzero(~met)
        met[rest] = _meets(corners[owner[rest]], box[rest] - grid_size / 2, 2**scale)
        owner, box = owner[met], box[met]
        if scale == 0:
            occupied[tuple(np.minimum(box, grid_size - 1).T)] = True
        else:
            stack += [(scale - 1, *pairs) for pairs in _cut(owner, box, low, high, scale - 1)]


def _cut(
    owner: np.ndarray, box: np.ndarray, low: np.ndarray, high: np.ndarray, scale: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Batches of (triangle, box) for the boxes of side 2^scale at a corner and beside it that bounding boxes meet."""
    boxes = box[:, None] + (_CORNERS << scale)  # [P, 8, 3]
    inside = (boxes >> scale <= high[owner, None] >> scale) & (boxes >> scale >= low[owner, None] >> scale)
    pair, corner = np.nonzero(inside.all(2))
    for start in range(0, len(pair), _PAIRS):
        batch = slice(start, start + _PAIRS)
        yield owner[pair[batch]], boxes[pair[batch], corner[batch]]


def _meets(triangles: np.ndarray, box: np.ndarray, side: int) -> np.ndarray:
    """Whether triangles [P, 3, 3] have a point in boxes [b, b + side) with corners b [P, 3], whose bounding boxes meet.

    Separating axes: the triangle's normal and the nine products of its edges and the box's. Two convex sets that only
    touch along an axis are apart there if the box touches with an upper face, which it does not hold; the same axes
    decide, since for every smaller box with its upper faces moved inwards they do.
    """
    vertices = np.ascontiguousarray((triangles - box[:, None]).transpose(1, 2, 0))  # [vertex, axis, P]
    edges = np.ascontiguousarray((np.roll(triangles, -1, 1) - triangles).transpose(1, 2, 0))
    (ax, ay, az), (bx, by, bz) = edges[0], edges[1]
    met = _overlap(vertices, (ay * bz - az * by, az * bx - ax * bz, ax * by - ay * bx), (0, 1, 2), side)
    index = np.flatnonzero(met)
    vertices, edges = vertices[:, :, index], edges[:, :, index]
    touched = np.ones(len(index), bool)
    for first, second in ((0, 1), (1, 2), (2, 0)):
        for edge in edges:
            touched &= _overlap(vertices, (-edge[second], edge[first]), (first, second), side)
    met[index] = touched
    return met


def _overlap(vertices: np.ndarray, direction: tuple[np.ndarray, ...], axes: tuple[int, ...], side: int) -> np.ndarray:
    """Whether triangles [vertex, axis, P] and the box [0, side)^3 overlap along directions, given by components."""
    along = [sum(d * vertex[axis] for d, axis in zip(direction, axes, strict=True)) for vertex in vertices]
    first = np.minimum(np.minimum(along[0], along[1]), along[2])
    last = np.maximum(np.maximum(along[0], along[1]), along[2])
    above = side * sum(np.maximum(d, 0) for d in direction)
    below = side * sum(np.minimum(d, 0) for d in direction)
    return np.where(above > 0, first < above, first <= 0) & np.where(below < 0, last > below, last >= 0)


def _fill_sampled(occupied: np.ndarray, triangles: np.ndarray) -> None:
    """Marks the voxels of barycentric lattices on triangles [F, 3, 3] in world units."""
    grid_size = len(occupied)
    edges = np.linalg.norm(triangles - np.roll(triangles, 1, axis=1), axis=-1).max(1)
    steps = np.maximum(1, np.ceil(edges * grid_size * _SAMPLES_PER_VOXEL)).astype(int)
    for n in np.unique(steps):
        u, v = np.meshgrid(np.arange(n + 1), np.arange(n + 1), indexing="ij")
        inside = u + v <= n
        weights = np.stack([u[inside], v[inside], n - u[inside] - v[inside]], 1) / n  # [P, 3]
        chosen = triangles[steps == n]
        per_batch = max(1, _BATCH_POINTS // len(weights))
        for start in range(0, len(chosen), per_batch):
            points = np.einsum("pk,fkd->fpd", weights, chosen[start : start + per_batch]).reshape(-1, 3)
            cells = np.clip(np.floor((points + 0.5) * grid_size), 0, grid_size - 1).astype(np.int64)
            occupied[tuple(cells.T)] = True
