"""Parametric surface patches. An object is a list of them; each gets its own tile of the object's texture."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from diff2to3.data._procedural._patterns import Pattern

# (s, t) in [0, 1], each [...] -> points [..., 3], unit normals [..., 3] and surface coordinates in world units [..., 2]
Chart = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Patch:
    """A chart, the grid lines in s and t at which it has vertices, and its colours."""

    chart: Chart
    columns: np.ndarray
    rows: np.ndarray
    pattern: Pattern


def turn(angle_degrees: float, axis: str = "z") -> np.ndarray:
    """Rotation matrix [3, 3], counter-clockwise about an axis that points at the viewer."""
    a = np.radians(angle_degrees)
    first, second = {"x": (1, 2), "y": (2, 0), "z": (0, 1)}[axis]
    matrix = np.eye(3)
    matrix[[first, second], [first, second]] = np.cos(a)
    matrix[first, second], matrix[second, first] = -np.sin(a), np.sin(a)
    return matrix


def moved(chart: Chart, centre: np.ndarray, rotation: np.ndarray) -> Chart:
    """The chart turned and then shifted."""

    def placed(s: np.ndarray, t: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        points, normals, uv = chart(s, t)
        return points @ rotation.T + centre, normals @ rotation.T, uv

    return placed


def box_charts(size: tuple[float, float, float], radius: float) -> list[tuple[Chart, np.ndarray, np.ndarray]]:
    """Six charts of a box around the origin with rounded edges, each with its grid lines in s and t."""
    half = np.asarray(size) / 2
    radius = min(radius, float(half.min()))

    def face(axis: int, sign: int) -> Chart:
        first, second = [i for i in range(3) if i != axis]

        def chart(s: np.ndarray, t: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
            outer = np.empty((*s.shape, 3))
            outer[..., axis] = sign * half[axis]
            outer[..., first] = (2 * s - 1) * half[first]
            outer[..., second] = (2 * t - 1) * half[second]
            inner = np.clip(outer, radius - half, half - radius)
            normals = (outer - inner) / np.linalg.norm(outer - inner, axis=-1, keepdims=True)
            return inner + radius * normals, normals, outer[..., [first, second]]

        return chart

    def lines(side: float) -> np.ndarray:
        inset = radius / (2 * side)
        return np.unique(np.clip([0, inset / 2, inset, 1 - inset, 1 - inset / 2, 1], 0, 1))

    result = []
    for axis in range(3):
        columns, rows = (lines(half[i]) for i in range(3) if i != axis)
        result += [(face(axis, sign), columns, rows) for sign in (-1, 1)]
    return result


def slab_charts(corners: np.ndarray) -> list[Chart]:
    """Flat charts of the faces of a body with corners [2, 2, 2, 3] (by side along its three directions).

    Faces may be triangles; those without area are left out. Surface coordinates are measured in the plane of the face.
    """
    middle = corners.reshape(-1, 3).mean(0)

    def normal_of(quad: np.ndarray) -> np.ndarray:
        return np.cross(quad[1, 1] - quad[0, 0], quad[0, 1] - quad[1, 0])

    def face(quad: np.ndarray) -> Chart:
        first = quad[1, 0] - quad[0, 0] + quad[1, 1] - quad[0, 1]
        normal = normal_of(quad)
        normal *= np.sign(normal @ (quad.reshape(-1, 3).mean(0) - middle)) / np.linalg.norm(normal)
        along = first / np.linalg.norm(first)
        across = np.cross(normal, along)

        def chart(s: np.ndarray, t: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
            s, t = s[..., None], t[..., None]
            points = (1 - t) * ((1 - s) * quad[0, 0] + s * quad[1, 0]) + t * ((1 - s) * quad[0, 1] + s * quad[1, 1])
            return points, np.broadcast_to(normal, points.shape), np.stack([points @ along, points @ across], -1)

        return chart

    quads = [corners.take(side, axis) for axis in range(3) for side in (0, 1)]
    return [face(quad) for quad in quads if np.linalg.norm(normal_of(quad)) > 1e-9]


def smooth_curve(points: np.ndarray, steps: int = 6) -> np.ndarray:
    """Catmull-Rom curve [M, D] through points [K, D]."""
    padded = np.concatenate([points[:1], points, points[-1:]])
    t = (np.arange(steps) / steps)[:, None]
    pieces = []
    for a, b, c, d in zip(padded, padded[1:], padded[2:], padded[3:], strict=False):
        pieces.append(0.5 * (2 * b + (c - a) * t + (2 * a - 5 * b + 4 * c - d) * t**2 + (3 * b - a - 3 * c + d) * t**3))
    return np.concatenate([*pieces, points[-1:]])


def lathe_chart(profile: np.ndarray) -> tuple[Chart, np.ndarray]:
    """Chart of a profile [K, 2] of (radius, z), from bottom to top, turned about z; and its grid lines in t.

    s runs once around. Normals point away from the axis where the profile rises.
    """
    steps = np.diff(profile, axis=0)
    lengths = np.maximum(np.linalg.norm(steps, axis=1), 1e-9)
    arc = np.concatenate([[0], np.cumsum(lengths)])
    slopes = steps / lengths[:, None]
    girth = max(float(profile[:, 0].max()), 1e-6)

    def chart(s: np.ndarray, t: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        along = t * arc[-1]
        segment = np.clip(np.searchsorted(arc, along, side="right") - 1, 0, len(steps) - 1)
        radius, z = (np.interp(along, arc, profile[:, i]) for i in range(2))
        angle = 2 * np.pi * s
        cos, sin = np.cos(angle), np.sin(angle)
        out, up = slopes[segment, 1], -slopes[segment, 0]
        points = np.stack([radius * cos, radius * sin, z], -1)
        return points, np.stack([out * cos, out * sin, up], -1), np.stack([angle * girth, along], -1)

    return chart, arc / arc[-1]


def tube_chart(path: np.ndarray, radius: float) -> tuple[Chart, np.ndarray]:
    """Chart of a round tube along a path [K, 3]; and its grid lines in t."""
    tangents = np.gradient(path, axis=0)
    tangents /= np.linalg.norm(tangents, axis=1, keepdims=True)
    side = np.eye(3)[np.abs(tangents[0]).argmin()]
    sides = []
    for tangent in tangents:  # parallel transport: the frame turns no more than it must
        side = side - tangent * (side @ tangent)
        side = side / np.linalg.norm(side)
        sides.append(side)
    first = np.stack(sides)
    second = np.cross(tangents, first)
    arc = np.concatenate([[0], np.cumsum(np.linalg.norm(np.diff(path, axis=0), axis=1))])

    def chart(s: np.ndarray, t: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        along = t * arc[-1]

        def at(values: np.ndarray) -> np.ndarray:
            return np.stack([np.interp(along, arc, values[:, i]) for i in range(3)], -1)

        angle = 2 * np.pi * s
        normals = at(first) * np.cos(angle)[..., None] + at(second) * np.sin(angle)[..., None]
        normals /= np.linalg.norm(normals, axis=-1, keepdims=True)
        return at(path) + radius * normals, normals, np.stack([angle * radius, along], -1)

    return chart, arc / arc[-1]


class Builder:
    """Collects the patches of one object. World units, z up, front towards -y."""

    def __init__(self) -> None:
        self.patches: list[Patch] = []

    def box(
        self,
        centre: tuple[float, float, float],
        size: tuple[float, float, float],
        pattern: Pattern,
        radius: float = 0.012,
        rotation: np.ndarray | None = None,
    ) -> None:
        """A box with edges rounded by ``radius``, turned about its centre."""
        for chart, columns, rows in box_charts(size, radius):
            self._add(chart, columns, rows, pattern, centre, rotation)

    def slab(self, corners: list[list[list[tuple[float, float, float]]]], pattern: Pattern) -> None:
        """A body with flat faces and corners [2, 2, 2]; corners may coincide, so prisms and wedges are slabs too."""
        lines = np.linspace(0, 1, 9)  # two triangles alone would not follow a face that is no parallelogram
        for chart in slab_charts(np.asarray(corners, float)):
            self._add(chart, lines, lines, pattern, (0, 0, 0), None)

    def plate(
        self, outline: list[tuple[float, float]], thickness: float, pattern: Pattern, rotation: np.ndarray
    ) -> None:
        """An upright plate: four corners (x, z) in order round it, turned by ``rotation`` about the origin."""
        a, b, c, d = outline
        half = thickness / 2
        quad = np.array([[[(x, y, z) for y in (-half, half)] for x, z in pair] for pair in ((a, d), (b, c))])
        self.slab((quad @ rotation.T).tolist(), pattern)

    def lathe(
        self,
        centre: tuple[float, float, float],
        profile: list[tuple[float, float]],
        pattern: Pattern,
        smooth: bool = False,
        rotation: np.ndarray | None = None,
    ) -> None:
        """A surface of revolution; ``profile`` lists (radius, z) so that the outside lies to the right of its way."""
        points = np.asarray(profile, float)
        if smooth:
            points = smooth_curve(points)
            points[:, 0] = np.maximum(points[:, 0], 0)
        chart, rows = lathe_chart(points)
        self._add(chart, np.linspace(0, 1, 33), rows, pattern, centre, rotation)

    def cylinder(
        self,
        centre: tuple[float, float, float],
        radius: float | tuple[float, float],
        height: float,
        pattern: Pattern,
        rotation: np.ndarray | None = None,
    ) -> None:
        """A closed cylinder, or a frustum with (bottom, top) radii, about its centre."""
        low, high = radius if isinstance(radius, tuple) else (radius, radius)
        half, bevel = height / 2, 0.15 * min(max(low, high), height / 2)
        profile = [(0, -half), (max(low - bevel, 0), -half), (low, bevel - half), (high, half - bevel)]
        self.lathe(centre, [*profile, (max(high - bevel, 0), half), (0, half)], pattern, rotation=rotation)

    def ball(
        self,
        centre: tuple[float, float, float],
        radius: float,
        pattern: Pattern,
        stretch: float = 1.0,
        rotation: np.ndarray | None = None,
    ) -> None:
        """A sphere, ``stretch`` times as high as wide."""
        angle = np.linspace(-np.pi / 2, np.pi / 2, 17)
        profile = [(float(radius * np.cos(a)), float(radius * stretch * np.sin(a))) for a in angle]
        self.lathe(centre, profile, pattern, rotation=rotation)

    def tube(self, path: Sequence[tuple[float, float, float]], radius: float, pattern: Pattern) -> None:
        """An open tube along a smooth curve through the points."""
        chart, rows = tube_chart(smooth_curve(np.asarray(path, float)), radius)
        self._add(chart, np.linspace(0, 1, 17), rows, pattern, (0, 0, 0), None)

    def _add(
        self,
        chart: Chart,
        columns: np.ndarray,
        rows: np.ndarray,
        pattern: Pattern,
        centre: tuple[float, float, float],
        rotation: np.ndarray | None,
    ) -> None:
        chart = moved(chart, np.asarray(centre, float), np.eye(3) if rotation is None else rotation)
        self.patches.append(Patch(chart, columns, rows, pattern))
