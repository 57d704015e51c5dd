"""Numba kernels of the CPU backend: bin by tile, blend front to back, and the gradient of the blend.

Every kernel releases the GIL and works on a range of tiles, so a plain thread pool runs them: `prange` would bring
OpenMP, whose workers do not survive the fork of a data loader. Machine code is cached on disk at the first call
(see `_compile`).

A tile is 16 x 16 pixels. Within a tile each Gaussian visits only the rows that it reaches, and a row is always
processed whole: a branch-free loop of fixed length becomes SIMD code, which beats skipping pixels.

`no_type_check` keeps run-time shape checkers, which rewrite functions, away from what numba compiles.
"""

from __future__ import annotations

from typing import no_type_check

import numpy as np

from gs_render._backends._compile import compiled
from gs_render._project import MAX_ALPHA, MIN_ALPHA, MIN_TRANSMITTANCE

TILE = 16
CHANNELS = 4
NUM_GRADIENTS = 10  # x, y, conic xx, xy, yy, opacity, 4 features

_f32 = np.float32
_MIN_ALPHA = _f32(MIN_ALPHA)
_MAX_ALPHA = _f32(MAX_ALPHA)
_MIN_T = _f32(MIN_TRANSMITTANCE)
_ZERO, _HALF, _ONE = _f32(0), _f32(0.5), _f32(1)
# Beyond this exponent even an opaque Gaussian is under MIN_ALPHA (ln 255 = 5.54), so exp needs no more range.
_MAX_POWER = _f32(6.0)

_OPTIONS = {"nogil": True, "fastmath": True, "error_model": "numpy", "boundscheck": False}


@compiled(inline="always", **_OPTIONS)
@no_type_check
def _exp_neg(power):
    """exp(-power) for 0 <= power <= 6, relative error 2e-6: exp(-power / 8) by a polynomial, then three squarings.

    The coefficients are the degree 6 minimax fit of exp on [-0.75, 0] with p(0) = 1 (relative error 4e-9, unrounded).
    """
    u = power * _f32(-0.125)
    e = _f32(0.0009553428819957082)
    e = e * u + _f32(0.00791143404323461)
    e = e * u + _f32(0.04145645452180806)
    e = e * u + _f32(0.16661254876121306)
    e = e * u + _f32(0.4999934787625518)
    e = e * u + _f32(0.9999997330419224)
    e = e * u + _ONE
    e = e * e
    e = e * e
    return e * e


@compiled(**_OPTIONS)
@no_type_check
def sort_by_depth(depths, ids):
    """Stable radix sort of the indices `ids` by their positive depths, 3 passes of 11 bits."""
    count = ids.size
    keys = np.empty(count, np.uint32)
    bits = depths.view(np.uint32)  # the order of positive floats is the order of their bits
    for i in range(count):
        keys[i] = bits[ids[i]]
    other_keys, other_ids = np.empty_like(keys), np.empty_like(ids)
    counters = np.empty(2049, np.int64)
    for shift in (0, 11, 22):
        counters[:] = 0
        for i in range(count):
            counters[((keys[i] >> shift) & 2047) + 1] += 1
        for i in range(2048):
            counters[i + 1] += counters[i]
        for i in range(count):
            slot = (keys[i] >> shift) & 2047
            other_keys[counters[slot]] = keys[i]
            other_ids[counters[slot]] = ids[i]
            counters[slot] += 1
        keys, other_keys = other_keys, keys
        ids, other_ids = other_ids, ids
    return ids


@compiled(**_OPTIONS)
@no_type_check
def tile_boxes(ids, means, reach, tiles_x, tiles_y):
    """[M, 4] first and last + 1 tile column and row of each Gaussian, and the number of (Gaussian, tile) hits."""
    boxes = np.empty((ids.size, 4), np.int32)
    total = 0
    for i in range(ids.size):
        g = ids[i]
        for axis in range(2):
            limit = tiles_x if axis == 0 else tiles_y
            low = (means[g, axis] - reach[g, axis] - _HALF) / _f32(TILE)
            high = (means[g, axis] + reach[g, axis] - _HALF) / _f32(TILE)
            boxes[i, 2 * axis] = min(max(int(np.floor(max(low, _ZERO))), 0), limit)
            boxes[i, 2 * axis + 1] = min(max(int(np.floor(min(high, _f32(limit)))) + 1, 0), limit)
        total += max(boxes[i, 1] - boxes[i, 0], 0) * max(boxes[i, 3] - boxes[i, 2], 0)
    return boxes, total


@compiled(**_OPTIONS)
@no_type_check
def bin_hits(boxes, total, tiles_x, num_tiles):
    """Hits grouped by tile, in the order of the input within each: (offsets [T + 1], index into the input [total])."""
    offsets = np.zeros(num_tiles + 1, np.int64)
    for i in range(boxes.shape[0]):
        for row in range(boxes[i, 2], boxes[i, 3]):
            for column in range(boxes[i, 0], boxes[i, 1]):
                offsets[row * tiles_x + column + 1] += 1
    for tile in range(num_tiles):
        offsets[tile + 1] += offsets[tile]
    cursor = offsets[:-1].copy()
    hits = np.empty(total, np.int32)
    for i in range(boxes.shape[0]):
        for row in range(boxes[i, 2], boxes[i, 3]):
            for column in range(boxes[i, 0], boxes[i, 1]):
                tile = row * tiles_x + column
                hits[cursor[tile]] = i
                cursor[tile] += 1
    return offsets, hits


@compiled(**_OPTIONS)
@no_type_check
def pack(ids, means, conics, opacities, features, reach):
    """[M, 12] one cache line a Gaussian, in order of depth: x, y, conic, opacity, features, reach in y."""
    table = np.empty((ids.size, 12), np.float32)
    for i in range(ids.size):
        g = ids[i]
        table[i, 0], table[i, 1] = means[g, 0], means[g, 1]
        table[i, 2], table[i, 3], table[i, 4] = conics[g, 0], conics[g, 1], conics[g, 2]
        table[i, 5] = opacities[g]
        for k in range(CHANNELS):
            table[i, 6 + k] = features[g, k]
        table[i, 10] = reach[g, 1]
    return table


@compiled(inline="always", **_OPTIONS)
@no_type_check
def _rows(entry, top, bottom):
    """Rows [first, last) of the tile, counted from its top, that a Gaussian reaches."""
    first = max(int(np.floor(max(entry[1] - entry[10] - _HALF, _f32(top)))) - top, 0)
    last = min(int(np.floor(min(entry[1] + entry[10] - _HALF, _f32(bottom)))) + 1, bottom) - top
    return first, last


@compiled(inline="always", **_OPTIONS)
@no_type_check
def _any(live):
    """Whether some pixel of a tile can still take colour."""
    total = _ZERO
    for j in range(TILE):
        for i in range(TILE):
            total += live[j, i]
    return total > _ZERO


@compiled(**_OPTIONS)
@no_type_check
def blend_tiles(first_tile, last_tile, tiles_x, offsets, hits, table, image, transmittance):
    """Blend tiles [first_tile, last_tile) into `image` [4, H', W'] and `transmittance` [H', W'] (whole tiles)."""
    t = np.empty((TILE, TILE), np.float32)
    live = np.empty((TILE, TILE), np.float32)
    sums = np.empty((CHANNELS, TILE, TILE), np.float32)
    for tile in range(first_tile, last_tile):
        top, left = (tile // tiles_x) * TILE, (tile % tiles_x) * TILE
        t[:] = _ONE
        live[:] = _ONE
        sums[:] = _ZERO
        for h in range(offsets[tile], offsets[tile + 1]):
            entry = table[hits[h]]
            first, last = _rows(entry, top, top + TILE)
            xx, xy, yy, opacity = entry[2], entry[3], entry[4], entry[5]
            f0, f1, f2, f3 = entry[6], entry[7], entry[8], entry[9]
            dx0 = _f32(left) + _HALF - entry[0]
            for j in range(first, last):
                dy = _f32(top + j) + _HALF - entry[1]
                row_power, row_slope = _HALF * yy * dy * dy, xy * dy
                for i in range(TILE):
                    dx = dx0 + _f32(i)
                    power = min(row_power + dx * (row_slope + _HALF * xx * dx), _MAX_POWER)
                    alpha = min(opacity * _exp_neg(power), _MAX_ALPHA)
                    drawn = live[j, i] if alpha >= _MIN_ALPHA else _ZERO
                    after = t[j, i] * (_ONE - alpha * drawn)
                    keep = _ONE if after > _MIN_T else _ZERO
                    weight = t[j, i] * alpha * drawn * keep
                    live[j, i] *= keep
                    t[j, i] = after if after > _MIN_T else t[j, i]
                    sums[0, j, i] += weight * f0
                    sums[1, j, i] += weight * f1
                    sums[2, j, i] += weight * f2
                    sums[3, j, i] += weight * f3
            if (h & 15) == 15 and not _any(live):
                break
        for j in range(TILE):
            for i in range(TILE):
                transmittance[top + j, left + i] = t[j, i]
                for k in range(CHANNELS):
                    image[k, top + j, left + i] = sums[k, j, i]


@compiled(**_OPTIONS)
@no_type_check
def blend_tiles_backward(first_tile, last_tile, tiles_x, offsets, hits, table, image_gradient, remaining, gradients):
    """Gradient of `blend_tiles`: one row of `gradients` [hits, 10] a hit, so that threads share nothing.

    The pixels are walked front to back again. `remaining` [H', W'] comes in as <image gradient, image> minus
    transmittance x alpha gradient; each Gaussian takes its own share off, so what is left is the influence of all
    that lies behind.
    """
    t = np.empty((TILE, TILE), np.float32)
    live = np.empty((TILE, TILE), np.float32)
    rest = np.empty((TILE, TILE), np.float32)
    grad = np.empty((CHANNELS, TILE, TILE), np.float32)
    for tile in range(first_tile, last_tile):
        top, left = (tile // tiles_x) * TILE, (tile % tiles_x) * TILE
        t[:] = _ONE
        live[:] = _ONE
        for j in range(TILE):
            for i in range(TILE):
                rest[j, i] = remaining[top + j, left + i]
                for k in range(CHANNELS):
                    grad[k, j, i] = image_gradient[k, top + j, left + i]
        for h in range(offsets[tile], offsets[tile + 1]):
            entry = table[hits[h]]
            first, last = _rows(entry, top, top + TILE)
            xx, xy, yy, opacity = entry[2], entry[3], entry[4], entry[5]
            f0, f1, f2, f3 = entry[6], entry[7], entry[8], entry[9]
            dx0 = _f32(left) + _HALF - entry[0]
            gx = gy = gxx = gxy = gyy = go = g0 = g1 = g2 = g3 = _ZERO
            for j in range(first, last):
                dy = _f32(top + j) + _HALF - entry[1]
                row_power, row_slope = _HALF * yy * dy * dy, xy * dy
                s0 = s1 = s2 = _ZERO
                for i in range(TILE):
                    dx = dx0 + _f32(i)
                    power = min(row_power + dx * (row_slope + _HALF * xx * dx), _MAX_POWER)
                    raw = opacity * _exp_neg(power)
                    alpha = min(raw, _MAX_ALPHA)
                    drawn = live[j, i] if alpha >= _MIN_ALPHA else _ZERO
                    after = t[j, i] * (_ONE - alpha * drawn)
                    keep = drawn if after > _MIN_T else _ZERO
                    live[j, i] *= _ONE if after > _MIN_T else _ZERO
                    before = t[j, i] * keep
                    t[j, i] = after if after > _MIN_T else t[j, i]
                    weight = before * alpha
                    along = f0 * grad[0, j, i] + f1 * grad[1, j, i] + f2 * grad[2, j, i] + f3 * grad[3, j, i]
                    rest[j, i] -= weight * along
                    slope = before * along - keep * rest[j, i] / (_ONE - alpha)
                    slope = slope * alpha if raw <= _MAX_ALPHA else _ZERO
                    s0 += slope
                    s1 += slope * dx
                    s2 += slope * dx * dx
                    g0 += weight * grad[0, j, i]
                    g1 += weight * grad[1, j, i]
                    g2 += weight * grad[2, j, i]
                    g3 += weight * grad[3, j, i]
                gx += xx * s1 + xy * dy * s0
                gy += xy * s1 + yy * dy * s0
                gxx -= _HALF * s2
                gxy -= dy * s1
                gyy -= _HALF * dy * dy * s0
                go += s0
            out = gradients[h]
            out[0], out[1], out[2], out[3], out[4] = gx, gy, gxx, gxy, gyy
            out[5] = go / opacity
            out[6], out[7], out[8], out[9] = g0, g1, g2, g3
            if (h & 15) == 15 and not _any(live):
                gradients[h + 1 : offsets[tile + 1]] = _ZERO
                break


@compiled(**_OPTIONS)
@no_type_check
def hits_of_each(boxes, offsets, total, tiles_x):
    """For every Gaussian where its hits stand: (starts [M + 1], positions in `hits` [total])."""
    starts = np.zeros(boxes.shape[0] + 1, np.int64)
    positions = np.empty(total, np.int32)
    cursor = offsets[:-1].copy()
    count = 0
    for i in range(boxes.shape[0]):
        for row in range(boxes[i, 2], boxes[i, 3]):
            for column in range(boxes[i, 0], boxes[i, 1]):
                tile = row * tiles_x + column
                positions[count] = cursor[tile]
                cursor[tile] += 1
                count += 1
        starts[i + 1] = count
    return starts, positions


@compiled(**_OPTIONS)
@no_type_check
def sum_hits(first, last, starts, positions, gradients, ids, out):
    """Add the gradient rows of all hits of Gaussians [first, last), in the order of tiles, into out [N, 10]."""
    for i in range(first, last):
        target = out[ids[i]]
        for n in range(starts[i], starts[i + 1]):
            row = gradients[positions[n]]
            for k in range(NUM_GRADIENTS):
                target[k] += row[k]
