"""Procedural colours: functions of the place on a surface."""

from __future__ import annotations

import colorsys
from collections.abc import Callable

import numpy as np

# points [..., 3] and surface coordinates [..., 2], both in world units -> RGB [..., 3] in [0, 1]
Pattern = Callable[[np.ndarray, np.ndarray], np.ndarray]
Colour = tuple[float, float, float]


def hsv(hue: float, saturation: float, value: float) -> Colour:
    """Colour from hue in turns, saturation and value in [0, 1]."""
    return colorsys.hsv_to_rgb(hue % 1, saturation, value)


def trilinear(grid: np.ndarray, place: np.ndarray) -> np.ndarray:
    """Values [...] of a grid [X, Y, Z] at places [..., 3] in units of cells; the grid repeats in all directions."""
    cell = np.floor(place)
    fx, fy, fz = np.moveaxis((place - cell).astype(np.float32), -1, 0)
    x, y, z = np.moveaxis(cell.astype(np.int64), -1, 0)
    (x0, x1), (y0, y1), (z0, z1) = (
        (index % size, (index + 1) % size) for index, size in zip((x, y, z), grid.shape, strict=True)
    )
    flat, (_, rows, depth) = grid.astype(np.float32).ravel(), grid.shape

    def line(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        base = (x * rows + y) * depth
        low = flat[base + z0]
        return low + fz * (flat[base + z1] - low)

    near, far = line(x0, y0), line(x1, y0)
    near, far = near + fy * (line(x0, y1) - near), far + fy * (line(x1, y1) - far)
    return near + fx * (far - near)


def noise(points: np.ndarray, frequency: float, seed: int, octaves: int = 3) -> np.ndarray:
    """Smooth value noise [...] in [0, 1] at points [..., 3]."""
    lattice = np.random.default_rng(seed).random((32, 32, 32))
    total, weight = np.zeros(points.shape[:-1]), 0.0
    for octave in range(octaves):
        place = points * (frequency * 2**octave)
        cell = np.floor(place)
        f = place - cell
        total += trilinear(lattice, cell + f * f * (3 - 2 * f)) / 2**octave
        weight += 1 / 2**octave
    return total / weight


def _mix(first: Colour, second: Colour, amount: np.ndarray) -> np.ndarray:
    return np.asarray(first) * (1 - amount[..., None]) + np.asarray(second) * amount[..., None]


def plain(colour: Colour, grain: float = 0.06, seed: int = 0) -> Pattern:
    """One colour with a faint mottling."""
    return lambda points, uv: np.asarray(colour) * (1 + grain * (noise(points, 22, seed)[..., None] - 0.5))


def wood(light: Colour, dark: Colour, seed: int, axis: int = 0) -> Pattern:
    """Grain that runs along a world axis."""

    def pattern(points: np.ndarray, uv: np.ndarray) -> np.ndarray:
        stretched = points * np.where(np.arange(3) == axis, 0.12, 1.0)
        rings = noise(stretched, 7, seed, 2) * 9
        fine = noise(stretched, 60, seed + 1, 2)
        return _mix(light, dark, np.clip(0.5 + 0.42 * np.sin(rings * 2 * np.pi) + 0.6 * (fine - 0.5), 0, 1))

    return pattern


def stripes(first: Colour, second: Colour, period: float, axis: int = 1) -> Pattern:
    """Stripes across a surface coordinate (0: s, 1: t)."""

    def pattern(points: np.ndarray, uv: np.ndarray) -> np.ndarray:
        wave = np.sin(2 * np.pi * uv[..., axis] / period)
        return _mix(first, second, np.clip(wave * 12 + 0.5, 0, 1))

    return pattern


def checker(first: Colour, second: Colour, period: float) -> Pattern:
    """Squares of side ``period / 2``."""

    def pattern(points: np.ndarray, uv: np.ndarray) -> np.ndarray:
        wave = np.sin(2 * np.pi * uv[..., 0] / period) * np.sin(2 * np.pi * uv[..., 1] / period)
        return _mix(first, second, np.clip(wave * 12 + 0.5, 0, 1))

    return pattern


def bricks(stone: Colour, mortar: Colour, height: float, seed: int) -> Pattern:
    """Courses of bricks twice as long as high, each brick of its own tone."""

    def pattern(points: np.ndarray, uv: np.ndarray) -> np.ndarray:
        row = np.floor(uv[..., 1] / height)
        along = uv[..., 0] / (2.2 * height) + 0.5 * (row % 2)
        column = np.floor(along)
        tone = np.random.default_rng(seed).random((64, 64))[row.astype(int) % 64, column.astype(int) % 64]
        joint = np.minimum(
            np.minimum(along - column, 1 - along + column) * 2.2,
            np.minimum(uv[..., 1] / height - row, 1 + row - uv[..., 1] / height),
        )
        brick = np.asarray(stone) * (0.8 + 0.4 * tone[..., None])
        gap = np.clip((joint - 0.06) * 14, 0, 1)[..., None]
        return np.clip(brick * gap + np.asarray(mortar) * (1 - gap), 0, 1)

    return pattern


def shingles(colour: Colour, height: float, seed: int) -> Pattern:
    """Overlapping rows of round-ended tiles."""

    def pattern(points: np.ndarray, uv: np.ndarray) -> np.ndarray:
        row = np.floor(uv[..., 1] / height)
        along = uv[..., 0] / height + 0.5 * (row % 2)
        column = np.floor(along)
        across, up = along - column - 0.5, uv[..., 1] / height - row
        tone = np.random.default_rng(seed).random((64, 64))[row.astype(int) % 64, column.astype(int) % 64]
        edge = np.clip((up - 1.6 * across**2) * 8, 0, 1)
        return np.clip(np.asarray(colour) * ((0.5 + 0.35 * edge + 0.12 * up + 0.2 * tone)[..., None]), 0, 1)

    return pattern


def dots(ground: Colour, spot: Colour, spacing: float, seed: int) -> Pattern:
    """Round spots scattered in space, so that they have no seam."""

    def pattern(points: np.ndarray, uv: np.ndarray) -> np.ndarray:
        cell = np.floor(points / spacing).astype(int)  # each cell holds one whole spot
        jitter = np.random.default_rng(seed).random((16, 16, 16, 4))[tuple(np.moveaxis(cell % 16, -1, 0))]
        distance = np.linalg.norm(points / spacing - cell - 0.35 - 0.3 * jitter[..., :3], axis=-1)
        return _mix(ground, spot, np.clip((0.22 + 0.12 * jitter[..., 3] - distance) * 20 + 0.5, 0, 1))

    return pattern


def blotches(first: Colour, second: Colour, frequency: float, seed: int, hardness: float = 4.0) -> Pattern:
    """Two colours that run into each other: foliage, marble, frosting."""

    def pattern(points: np.ndarray, uv: np.ndarray) -> np.ndarray:
        amount = (noise(points, frequency, seed) - 0.5) * hardness + 0.5
        return _mix(first, second, np.clip(amount, 0, 1))

    return pattern


def by_height(parts: list[tuple[float, Pattern]], axis: int = 2) -> Pattern:
    """Different patterns below successive heights; the last one takes the rest."""

    def pattern(points: np.ndarray, uv: np.ndarray) -> np.ndarray:
        result = parts[-1][1](points, uv)
        for limit, below in reversed(parts[:-1]):
            result = np.where((points[..., axis] < limit)[..., None], below(points, uv), result)
        return result

    return pattern
