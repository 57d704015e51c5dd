"""Numba kernels of the CPU renderer: the nearest triangle at every sample of a picture, then its colour.

Vertices are homogeneous sample coordinates (x w, y w, w), w the depth along the view; sample (column, row) is the point
(x, y) = (column, row). For a triangle with such vertices p, the functions e_i = (p_j x p_k) . (x, y, 1) over their sum
are the weights of its vertices, perspective included, and their sum over the determinant is 1 / w (Olano and Greer,
"Triangle Scan Conversion using 2D Homogeneous Coordinates", 1997). So nothing is clipped at the camera. Two triangles
find the same numbers, up to the sign, for an edge that they share: no sample falls between them.

A surface is a tuple of faces int32 [F, 3], uv float32 [V, 2], colors uint8 [V, 4], and a texture: its texels uint8
[h w, 4] from the top left, those of its smaller copies [M, 4], and the levels int64 [L, 3], each with the place of its
first texel, its width and its height; level 0 is the texture itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba as nb
import numpy as np

_ZERO = (0.0, 0.0, 0.0)


def _compiled(function: Callable[..., Any]) -> Any:
    """Machine code, kept on disk if there is a folder for it that can be written."""
    try:
        return nb.njit(cache=True, nogil=True, error_model="numpy")(function)
    except RuntimeError:
        return nb.njit(nogil=True, error_model="numpy")(function)


@_compiled
def _triangle(points, face):
    """Coefficients (a, b, c) of e_0, e_1 and e_2, which are positive inside, and the determinant."""
    p, q, r = points[face[0]], points[face[1]], points[face[2]]
    a0, b0, c0 = q[1] * r[2] - q[2] * r[1], q[2] * r[0] - q[0] * r[2], q[0] * r[1] - q[1] * r[0]
    a1, b1, c1 = r[1] * p[2] - r[2] * p[1], r[2] * p[0] - r[0] * p[2], r[0] * p[1] - r[1] * p[0]
    a2, b2, c2 = p[1] * q[2] - p[2] * q[1], p[2] * q[0] - p[0] * q[2], p[0] * q[1] - p[1] * q[0]
    determinant = p[0] * a0 + p[1] * b0 + p[2] * c0
    if determinant < 0:
        return (-a0, -b0, -c0), (-a1, -b1, -c1), (-a2, -b2, -c2), -determinant
    return (a0, b0, c0), (a1, b1, c1), (a2, b2, c2), determinant


@_compiled
def _sum(e0, e1, e2, x, y, z):
    """Coefficients of x e_0 + y e_1 + z e_2, which is linear in the sample's place as these are."""
    return (
        e0[0] * x + e1[0] * y + e2[0] * z,
        e0[1] * x + e1[1] * y + e2[1] * z,
        e0[2] * x + e1[2] * y + e2[2] * z,
    )


@_compiled
def _attributes(surface, face, e0, e1, e2):
    """Coefficients of the quotients' numerators (u, v, r, g, b, a, as weighted by the vertices) and denominator."""
    uv, colors = surface[1], surface[2]
    i, j, k = face[0], face[1], face[2]
    return (
        _sum(e0, e1, e2, uv[i, 0], uv[j, 0], uv[k, 0]),
        _sum(e0, e1, e2, uv[i, 1], uv[j, 1], uv[k, 1]),
        _sum(e0, e1, e2, colors[i, 0] / 255, colors[j, 0] / 255, colors[k, 0] / 255),
        _sum(e0, e1, e2, colors[i, 1] / 255, colors[j, 1] / 255, colors[k, 1] / 255),
        _sum(e0, e1, e2, colors[i, 2] / 255, colors[j, 2] / 255, colors[k, 2] / 255),
        _sum(e0, e1, e2, colors[i, 3] / 255, colors[j, 3] / 255, colors[k, 3] / 255),
        _sum(e0, e1, e2, 1.0, 1.0, 1.0),
    )


@_compiled
def _texel(texels, first, width, height, u, v):
    """Bilinear sample of one level, repeated beyond its edges; u to the right, v upwards, both of any size."""
    x = (u - np.floor(u)) * width - 0.5
    y = (np.ceil(v) - v) * height - 0.5
    column, row = int(np.floor(x)), int(np.floor(y))
    right, down = x - column, y - row
    x0, x1 = column if column >= 0 else width - 1, column + 1 if column + 1 < width else 0
    y0, y1 = row if row >= 0 else height - 1, row + 1 if row + 1 < height else 0
    above, below = first + y0 * width, first + y1 * width
    w00, w01, w10, w11 = (1 - right) * (1 - down), right * (1 - down), (1 - right) * down, right * down
    a, b, c, d = texels[above + x0], texels[above + x1], texels[below + x0], texels[below + x1]
    return (
        a[0] * w00 + b[0] * w01 + c[0] * w10 + d[0] * w11,
        a[1] * w00 + b[1] * w01 + c[1] * w10 + d[1] * w11,
        a[2] * w00 + b[2] * w01 + c[2] * w10 + d[2] * w11,
        a[3] * w00 + b[3] * w01 + c[3] * w10 + d[3] * w11,
    )


@_compiled
def _step(levels, attributes, x, y):
    """Square of how far a texture moves from a sample to the next, in texels, by the derivative of the quotients."""
    uu, vv, ones = attributes[0], attributes[1], attributes[6]
    scale = 1 / (ones[0] * x + ones[1] * y + ones[2])
    u, v = (uu[0] * x + uu[1] * y + uu[2]) * scale, (vv[0] * x + vv[1] * y + vv[2]) * scale
    width, height = levels[0, 1] * scale, levels[0, 2] * scale
    across = ((uu[0] - u * ones[0]) * width) ** 2 + ((vv[0] - v * ones[0]) * height) ** 2
    along = ((uu[1] - u * ones[1]) * width) ** 2 + ((vv[1] - v * ones[1]) * height) ** 2
    return max(across, along)


@_compiled
def _color(surface, attributes, x, y):
    """Texture times vertex colour, (r, g, b, a) of 0 to 255, at a sample of a triangle."""
    texels, smaller, levels = surface[3], surface[4], surface[5]
    uu, vv, rr, gg, bb, aa, ones = attributes
    scale = 1 / (ones[0] * x + ones[1] * y + ones[2])
    if len(levels) == 1:  # a single texel
        r, g, b, a = texels[0, 0] * 1.0, texels[0, 1] * 1.0, texels[0, 2] * 1.0, texels[0, 3] * 1.0
    else:
        u, v = (uu[0] * x + uu[1] * y + uu[2]) * scale, (vv[0] * x + vv[1] * y + vv[2]) * scale
        square = _step(levels, attributes, x, y)
        level = min(0.5 * np.log2(square), len(levels) - 1.0) if square > 1 else 0.0
        lower = int(level)
        part = level - lower
        source = texels if lower == 0 else smaller
        r, g, b, a = _texel(source, levels[lower, 0], levels[lower, 1], levels[lower, 2], u, v)
        if part > 0:
            lower += 1
            r1, g1, b1, a1 = _texel(smaller, levels[lower, 0], levels[lower, 1], levels[lower, 2], u, v)
            r, g, b, a = r + part * (r1 - r), g + part * (g1 - g), b + part * (b1 - b), a + part * (a1 - a)
    return (
        r * (rr[0] * x + rr[1] * y + rr[2]) * scale,
        g * (gg[0] * x + gg[1] * y + gg[2]) * scale,
        b * (bb[0] * x + bb[1] * y + bb[2]) * scale,
        a * (aa[0] * x + aa[1] * y + aa[2]) * scale,
    )


@_compiled
def _bounds(points, face, near, width, height):
    """First and last column and row that a triangle can reach, and its least and largest 1 / w; empty if behind."""
    left, right, top, bottom, far, close = np.inf, -np.inf, np.inf, -np.inf, np.inf, 0.0
    behind = 0
    for corner in face:
        x, y, w = points[corner, 0], points[corner, 1], points[corner, 2]
        if w < near:
            behind += 1
            continue
        left, right = min(left, x / w), max(right, x / w)
        top, bottom = min(top, y / w), max(bottom, y / w)
        far, close = min(far, 1 / w), max(close, 1 / w)
    if 0 < behind < 3:
        left, right, top, bottom, far, close = 0.0, width - 1.0, 0.0, height - 1.0, 0.0, 1 / near
    margin = 1e-6  # for what rounding does to x / w
    left, right = np.ceil(max(left - margin, 0.0)), np.floor(min(right + margin, width - 1.0))
    top, bottom = np.ceil(max(top - margin, 0.0)), np.floor(min(bottom + margin, height - 1.0))
    return left, right, top, bottom, far, close


@_compiled
def draw(points, surface, has_holes, near, first_id, nearest, owner):
    """Draws a surface into the buffers of all samples.

    Args:
        points: float64 [V, 3], see above.
        has_holes: whether alpha can be below one half, where nothing is drawn.
        near: least depth that is drawn.
        first_id: number of the surface's first triangle.
        nearest: float32 [H, W], 1 / depth of the nearest triangle so far, 0 for none; changed in place.
        owner: int32 [H, W], its number; changed in place.

    Returns:
        First column and row of a box that holds all samples drawn, and those after its last.
    """
    faces = surface[0]
    height, width = owner.shape
    first_x, first_y, end_x, end_y = width, height, 0, 0
    attributes = _attributes(surface, faces[0], _ZERO, _ZERO, _ZERO)
    for f in range(len(faces)):
        face = faces[f]
        left, right, top, bottom, far, close = _bounds(points, face, near, width, height)
        if not (left <= right and top <= bottom):
            continue
        e0, e1, e2, determinant = _triangle(points, face)
        if not determinant > 0:  # seen from its edge
            continue
        ones = _sum(e0, e1, e2, 1.0, 1.0, 1.0)
        if has_holes:
            attributes = _attributes(surface, face, e0, e1, e2)
        first_y, end_y = min(first_y, int(top)), max(end_y, int(bottom) + 1)
        first_x, end_x = min(first_x, int(left)), max(end_x, int(right) + 1)
        for y in range(int(top), int(bottom) + 1):
            start, end = left, right
            for e in (e0, e1, e2):
                rest = e[1] * y + e[2]
                if e[0] > 0:
                    start = max(start, -rest / e[0])
                elif e[0] < 0:
                    end = min(end, -rest / e[0])
                elif rest < 0:
                    end = -1.0
            slope, at_zero = ones[0] / determinant, (ones[1] * y + ones[2]) / determinant
            nearest_row, owner_row = nearest[y], owner[y]
            for x in range(int(np.ceil(start)), int(np.floor(end)) + 1):
                inverse = slope * x + at_zero
                if inverse > 1 / near:
                    continue
                inverse = np.float32(min(max(inverse, far), close))  # a sliver's may be nothing but rounding
                if inverse > nearest_row[x]:
                    if has_holes and _color(surface, attributes, x, y)[3] < 127.5:
                        continue
                    nearest_row[x] = inverse
                    owner_row[x] = first_id + f
    return first_x, first_y, end_x, end_y


@_compiled
def _one_owner(owner, row, column, samples):
    """The triangle of all samples of a pixel, or -1."""
    first = owner[row * samples, column * samples]
    for y in range(row * samples, (row + 1) * samples):
        for x in range(column * samples, (column + 1) * samples):
            if owner[y, x] != first:
                return -1
    return first


@_compiled
def shade(points, surface, box, first_id, owner, samples, total):
    """Adds the colours of a surface's samples, 0 to 255, to its pixels.

    A pixel inside one triangle on which the texture moves by less than half a texel has one colour, that of its middle.

    Args:
        box: what `draw` returned.
        owner: int32 [H, W], as it left it.
        samples: along a side of a pixel.
        total: float32 [H / samples, W / samples, 3]; changed in place.
    """
    faces, levels = surface[0], surface[5]
    first_x, first_y, end_x, end_y = box
    last = -1
    attributes = _attributes(surface, faces[0], _ZERO, _ZERO, _ZERO)
    for row in range(first_y // samples, -(-end_y // samples)):
        for column in range(first_x // samples, -(-end_x // samples)):
            first, step = _one_owner(owner, row, column, samples) - first_id, 1
            offset = 0.0
            if first >= 0 and first < len(faces):
                if first != last:
                    e0, e1, e2, _ = _triangle(points, faces[first])
                    attributes = _attributes(surface, faces[first], e0, e1, e2)
                    last = first
                middle = (samples - 1) / 2
                moves = 0.0
                if len(levels) > 1:
                    moves = _step(levels, attributes, column * samples + middle, row * samples + middle)
                if moves * samples * samples < 0.25:
                    step, offset = samples, middle
            for y in range(row * samples, (row + 1) * samples, step):
                for x in range(column * samples, (column + 1) * samples, step):
                    f = owner[y, x] - first_id
                    if f < 0 or f >= len(faces):
                        continue
                    if f != last:
                        e0, e1, e2, _ = _triangle(points, faces[f])
                        attributes = _attributes(surface, faces[f], e0, e1, e2)
                        last = f
                    r, g, b, _ = _color(surface, attributes, x + offset, y + offset)
                    pixel = total[row, column]
                    pixel[0] += r * (step * step)
                    pixel[1] += g * (step * step)
                    pixel[2] += b * (step * step)


@_compiled
def resolve(owner, samples, total, picture):
    """Writes the picture, uint8 [H / samples, W / samples, 4] with straight alpha, from the samples' sums."""
    height, width = picture.shape[:2]
    for row in range(height):
        for column in range(width):
            hits = 0
            for y in range(row * samples, (row + 1) * samples):
                for x in range(column * samples, (column + 1) * samples):
                    hits += owner[y, x] >= 0
            scale = 1 / max(hits, 1)
            for channel in range(3):
                picture[row, column, channel] = min(total[row, column, channel] * scale + 0.5, 255.0)
            picture[row, column, 3] = hits * 255 / (samples * samples) + 0.5
