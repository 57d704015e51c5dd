"""The objects: one function a family. z up, front towards -y, about one unit tall; the loader normalises."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from diff2to3.data._procedural._patterns import (
    Colour,
    Pattern,
    blotches,
    bricks,
    by_height,
    checker,
    dots,
    hsv,
    plain,
    shingles,
    stripes,
    wood,
)
from diff2to3.data._procedural._surfaces import Builder, turn

Random = np.random.Generator
_DARK: Colour = (0.16, 0.16, 0.18)
_CREAM: Colour = (0.96, 0.92, 0.83)


def _seed(rng: Random) -> int:
    return int(rng.integers(2**31))


def _bright(rng: Random, saturation: float = 0.68, value: float = 0.88) -> Colour:
    return hsv(rng.random(), saturation, value)


def _timber(rng: Random, axis: int = 0) -> Pattern:
    hue, value = rng.uniform(0.055, 0.095), rng.uniform(0.55, 0.85)
    return wood(hsv(hue, 0.52, value), hsv(hue - 0.01, 0.62, value * 0.74), _seed(rng), axis)


def _cloth(rng: Random) -> Pattern:
    first, period = _bright(rng), rng.uniform(0.09, 0.16)
    return [stripes(first, _CREAM, period, int(rng.integers(2))), checker(first, _CREAM, period), plain(first, 0.2)][
        rng.integers(3)
    ]


def chair(b: Builder, rng: Random) -> None:
    """Four legs, cushion, slatted or solid back."""
    timber, upright = _timber(rng), _timber(rng, 2)
    width, depth, seat = rng.uniform(0.46, 0.56), rng.uniform(0.44, 0.5), rng.uniform(0.42, 0.48)
    for x in (-1, 1):
        for y in (-1, 1):
            top = 1.0 if y > 0 else seat
            b.box((x * (width / 2 - 0.03), y * (depth / 2 - 0.03), top / 2), (0.055, 0.055, top), upright, 0.015)
        b.box((x * (width / 2 - 0.03), 0, 0.17), (0.03, depth - 0.08, 0.035), _timber(rng, 1), 0.01)
    b.box((0, 0, seat), (width, depth, 0.05), timber, 0.018)
    b.box((0, -0.01, seat + 0.045), (width * 0.9, depth * 0.88, 0.06), _cloth(rng), 0.03)
    b.box((0, depth / 2 - 0.03, 0.95), (width, 0.045, 0.11), timber, 0.02)
    if rng.random() < 0.6:
        for x in np.linspace(-0.32, 0.32, 4):
            b.box((float(x) * width, depth / 2 - 0.03, 0.71), (0.045, 0.025, 0.44), upright, 0.01)
        b.box((0, depth / 2 - 0.03, 0.56), (width - 0.06, 0.03, 0.05), timber, 0.012)
    else:
        b.box((0, depth / 2 - 0.03, 0.76), (width * 0.82, 0.05, 0.26), _cloth(rng), 0.025)


def table(b: Builder, rng: Random) -> None:
    """A table with a bowl of fruit, or a round one with a cloth."""
    if rng.random() < 0.5:
        size = (rng.uniform(0.9, 1.1), rng.uniform(0.55, 0.7))
        b.box((0, 0, 0.6), (*size, 0.05), _timber(rng), 0.015)
        b.box((0, 0, 0.54), (size[0] - 0.14, size[1] - 0.14, 0.09), _timber(rng), 0.01)
        for x in (-1, 1):
            for y in (-1, 1):
                at = (x * (size[0] / 2 - 0.08), y * (size[1] / 2 - 0.08), 0.29)
                b.cylinder(at, (0.028, 0.045), 0.58, _timber(rng, 2))
    else:
        b.lathe((0, 0, 0), [(0, 0), (0.26, 0), (0.26, 0.03), (0.06, 0.07), (0.045, 0.58)], _timber(rng, 2))
        first = _bright(rng)
        cloth = by_height([(0.56, stripes(_CREAM, first, 0.05, 0)), (9, checker(first, _CREAM, 0.14))])
        b.lathe((0, 0, 0), [(0.5, 0.5), (0.48, 0.61), (0.46, 0.625), (0, 0.625)], cloth)
    bowl = blotches(_bright(rng, 0.4), _CREAM, 9, _seed(rng))
    b.lathe((0, 0, 0.625), [(0, 0), (0.08, 0), (0.17, 0.09), (0.16, 0.095), (0.1, 0.03), (0, 0.02)], bowl)
    for k in range(4):
        angle = k * np.pi / 2 + 0.4
        fruit = plain(hsv((0.0, 0.08, 0.13, 0.27)[k], 0.8, 0.9), 0.25, _seed(rng))
        b.ball((0.075 * np.cos(angle), 0.075 * np.sin(angle), 0.725), 0.055, fruit)


def mug(b: Builder, rng: Random) -> None:
    """A mug with a patterned band, a handle and coffee."""
    base, accent = _bright(rng, 0.6), _bright(rng, 0.75)
    band = [dots(base, _CREAM, 0.11, _seed(rng)), stripes(base, _CREAM, 0.12, 0), checker(base, accent, 0.13)]
    chosen = band[rng.integers(3)]
    glaze = by_height([(0.14, plain(_CREAM)), (0.62, chosen), (9, plain(_CREAM))])
    r = rng.uniform(0.3, 0.36)
    outside = [(0, 0), (r - 0.05, 0), (r - 0.01, 0.03), (r, 0.09), (r, 0.7), (r - 0.015, 0.735), (r - 0.035, 0.735)]
    b.lathe((0, 0, 0), outside, glaze)
    b.lathe((0, 0, 0), [(r - 0.045, 0.6), (r - 0.035, 0.735)], plain(_CREAM))
    b.lathe((0, 0, 0.64), [(r - 0.04, 0), (0, 0)], blotches((0.28, 0.16, 0.09), (0.42, 0.26, 0.15), 6, _seed(rng)))
    path = [(r - 0.03, 0, 0.58), (r + 0.13, 0, 0.6), (r + 0.21, 0, 0.42), (r + 0.15, 0, 0.22), (r - 0.03, 0, 0.16)]
    b.tube(path, 0.045, plain(accent))


def house(b: Builder, rng: Random) -> None:
    """Brick or plaster walls, shingled gable roof, windows, door, chimney."""
    seed = _seed(rng)
    brick = bricks(hsv(rng.uniform(0.01, 0.06), 0.55, 0.75), (0.85, 0.82, 0.76), 0.045, seed)
    wall = [brick, blotches(_CREAM, (0.88, 0.8, 0.66), 5, seed, 1.5), stripes(_bright(rng, 0.3), _CREAM, 0.06)]
    chosen, roof = wall[rng.integers(3)], shingles(hsv(rng.choice([0.01, 0.6, 0.4, 0.95]), 0.5, 0.72), 0.06, seed)
    w, d, h = rng.uniform(0.66, 0.8), rng.uniform(0.55, 0.65), rng.uniform(0.4, 0.5)
    b.box((0, 0, 0.02), (w + 0.2, d + 0.2, 0.05), blotches((0.42, 0.62, 0.3), (0.3, 0.5, 0.22), 12, seed), 0.02)
    b.box((0, 0, h / 2 + 0.03), (w, d, h), chosen, 0.006)
    rise, half = 0.3, d / 2 + 0.06
    tilt, length = float(np.degrees(np.arctan2(rise, d / 2))), float(np.hypot(rise, d / 2)) * half / (d / 2)
    for side in (-1, 1):
        centre = (0, side * half / 2, h + 0.05 + rise - rise * half / d)
        b.box(centre, (w + 0.12, length, 0.04), roof, 0.008, turn(-side * tilt, "x"))

    low, top, x = h + 0.03, h + 0.03 + rise, w / 2
    gable = [[[(side * x, y, low), (side * x, 0.0, top)] for y in (-d / 2, d / 2)] for side in (-1, 1)]
    b.slab(gable, chosen)
    b.box((w * 0.27, 0.1, h + rise), (0.1, 0.1, 0.32), brick, 0.006)
    front, frame, glass = -d / 2, plain(_CREAM, 0), blotches((0.45, 0.66, 0.85), (0.75, 0.88, 0.96), 6, seed)
    b.box((0, front, 0.16), (0.15, 0.03, 0.27), plain(_bright(rng)), 0.01)
    b.ball((0.05, front - 0.022, 0.16), 0.012, plain((0.95, 0.8, 0.3)))
    for x in (-0.31 * w, 0.31 * w):
        for y, deep in ((front, 0.03), (-front, 0.03)):
            b.box((x, y, 0.28), (0.17, deep, 0.19), frame, 0.006)
            for dx in (-0.036, 0.036):
                b.box((x + dx, y * 1.02, 0.28), (0.06, deep, 0.155), glass, 0.004)
    for x in (-w / 2, w / 2):
        b.box((x, 0, 0.28), (0.03, 0.19, 0.19), frame, 0.006)
        b.box((x * 1.02, 0, 0.28), (0.03, 0.155, 0.155), glass, 0.004)


def rocket(b: Builder, rng: Random) -> None:
    """A toy rocket with fins, porthole and flame."""
    body, accent = _CREAM, _bright(rng, 0.78)
    bands = by_height([(0.3, plain(accent)), (0.36, plain(_DARK)), (0.86, plain(body)), (9, plain(accent))])
    profile = [(0.13, 0.17), (0.2, 0.36), (0.225, 0.58), (0.19, 0.8), (0.1, 1.0), (0.03, 1.1), (0, 1.13)]
    b.lathe((0, 0, 0), [(0, 0.17), (0.13, 0.17)], plain(_DARK))
    b.lathe((0, 0, 0), profile, bands, smooth=True)
    b.lathe((0, 0, 0), [(0.12, 0.07), (0.08, 0.18)], plain((0.35, 0.36, 0.4)))
    flame = by_height([(-0.05, plain((0.95, 0.35, 0.1))), (9, plain((1.0, 0.8, 0.25)))])
    b.lathe((0, 0, 0), [(0, -0.17), (0.045, -0.08), (0.085, 0.03), (0.075, 0.1), (0, 0.12)], flame, smooth=True)
    fins = int(rng.integers(3, 5))
    for k in range(fins):
        outline = [(0.15, 0.52), (0.15, 0.22), (0.31, -0.02), (0.31, 0.18)]
        b.plate(outline, 0.035, plain(accent), turn(360 * k / fins - 45))
    for z, size in ((0.66, 0.085), (0.45, 0.055)):
        b.cylinder((0, -0.2, z), size, 0.07, plain((0.5, 0.52, 0.57)), turn(90, "x"))
        b.cylinder((0, -0.222, z), size * 0.72, 0.06, plain((0.45, 0.75, 0.95), 0.4), turn(90, "x"))


def mushroom(b: Builder, rng: Random) -> None:
    """A spotted toadstool with smaller ones in a patch of moss."""
    hue = float(rng.choice([0.99, 0.03, 0.09, 0.75]))
    moss = blotches((0.36, 0.55, 0.24), (0.24, 0.4, 0.16), 16, _seed(rng))
    b.lathe((0, 0, 0), [(0, 0), (0.4, 0), (0.42, 0.03), (0.33, 0.09), (0, 0.12)], moss, smooth=True)
    spots = [(0.0, 0.02, 1.0, 0.0)]
    spots += [(0.26, -0.12, 0.45, 12.0), (-0.25, -0.14, 0.35, -14.0)][: int(rng.integers(1, 3))]
    for x, y, size, lean in spots:
        rotation, seed = turn(lean, "y"), _seed(rng)
        stem = [(0.12, 0.0), (0.095, 0.2), (0.085, 0.45), (0.1, 0.62)]
        cap = [(0.12, 0.56), (0.33, 0.55), (0.37, 0.59), (0.32, 0.75), (0.19, 0.88), (0, 0.93)]
        skin, gills = dots(hsv(hue, 0.82, 0.85), _CREAM, 0.2 * size, seed), stripes(_CREAM, (0.85, 0.76, 0.62), 0.05, 0)
        pieces = ((stem, plain((0.95, 0.91, 0.82), 0.25)), (cap[:2], gills), (cap[1:], skin))
        for profile, pattern in pieces:
            scaled = [(r * size, z * size) for r, z in profile]
            b.lathe((x, y, 0.07), scaled, pattern, smooth=True, rotation=rotation)


def robot(b: Builder, rng: Random) -> None:
    """A friendly toy robot."""
    main, accent = _bright(rng, 0.55, 0.85), _bright(rng, 0.8, 0.95)
    skin, metal = plain(main, 0.12), plain((0.55, 0.57, 0.62), 0.15)
    b.box((0, 0, 0.46), (0.42, 0.28, 0.38), skin, 0.05)
    b.box((0, -0.137, 0.48), (0.28, 0.03, 0.2), plain((0.22, 0.24, 0.29)), 0.014)
    for k, hue in enumerate((0.0, 0.14, 0.36)):
        b.ball((-0.08 + 0.08 * k, -0.155, 0.53), 0.024, plain(hsv(hue, 0.85, 0.95)))
    b.box((0, -0.148, 0.44), (0.21, 0.02, 0.05), stripes(accent, _CREAM, 0.04, 0), 0.006)
    b.cylinder((0, 0, 0.675), 0.07, 0.08, metal)
    b.box((0, 0, 0.83), (0.36, 0.28, 0.25), skin, 0.06)
    for x in (-1, 1):
        b.cylinder((x * 0.08, -0.14, 0.86), 0.06, 0.04, plain(_CREAM, 0), turn(90, "x"))
        b.cylinder((x * 0.075, -0.157, 0.86), 0.03, 0.03, plain(_DARK, 0), turn(90, "x"))
        b.cylinder((x * 0.2, 0, 0.83), 0.055, 0.06, plain(accent), turn(90, "y"))
        b.tube([(x * 0.2, 0, 0.58), (x * 0.3, 0, 0.54), (x * 0.32, -0.05, 0.4)], 0.042, stripes(main, _CREAM, 0.04))
        b.ball((x * 0.32, -0.06, 0.36), 0.065, metal)
        b.tube([(x * 0.11, 0, 0.3), (x * 0.115, 0, 0.2), (x * 0.12, 0, 0.1)], 0.055, stripes(main, _CREAM, 0.04))
        b.box((x * 0.125, -0.03, 0.05), (0.15, 0.24, 0.1), plain(accent, 0.1), 0.04)
    b.box((0, -0.14, 0.765), (0.14, 0.02, 0.03), stripes(_CREAM, _DARK, 0.035, 0), 0.006)
    b.tube([(0, 0, 0.95), (0, 0, 1.0), (0, 0, 1.05)], 0.012, metal)
    b.ball((0, 0, 1.07), 0.036, plain(accent, 0))


def lamp(b: Builder, rng: Random) -> None:
    """A table lamp."""
    foot, shade = _bright(rng, 0.55, 0.7), _bright(rng, 0.5, 0.95)
    body = [(0.2, 0), (0.21, 0.03), (0.1, 0.07), (0.13, 0.2), (0.15, 0.28), (0.06, 0.42), (0.03, 0.52)]
    b.lathe((0, 0, 0), body, blotches(foot, _CREAM, 8, _seed(rng), 3), smooth=True)
    trim = [stripes(shade, _CREAM, 0.12, 0), dots(shade, _CREAM, 0.11, _seed(rng)), plain(shade, 0.2)][rng.integers(3)]
    b.lathe((0, 0, 0), [(0.32, 0.5), (0.2, 0.88)], by_height([(0.53, plain(foot)), (0.85, trim), (9, plain(foot))]))
    b.lathe((0, 0, 0), [(0.195, 0.87), (0.31, 0.51)], plain((1.0, 0.95, 0.8), 0))
    b.ball((0, 0, 0.63), 0.07, plain((1.0, 0.97, 0.85), 0))


def bottle(b: Builder, rng: Random) -> None:
    """A bottle with a label and a cork."""
    glass, label = hsv(rng.choice([0.33, 0.1, 0.55, 0.45]), 0.6, 0.5), _bright(rng, 0.55, 0.9)
    print_ = by_height([(0.26, plain(label)), (0.44, stripes(_CREAM, (0.3, 0.3, 0.35), 0.035)), (9, plain(label))])
    paint = by_height([(0.2, plain(glass, 0.3)), (0.5, print_), (9, plain(glass, 0.3))])
    r, neck = rng.uniform(0.15, 0.2), rng.uniform(0.05, 0.065)
    profile = [(0, 0), (r - 0.02, 0), (r, 0.03), (r, 0.55), (r - 0.02, 0.62), (neck + 0.02, 0.72), (neck, 0.78)]
    b.lathe((0, 0, 0), [*profile, (neck, 0.93), (neck + 0.012, 0.935), (neck + 0.012, 0.965), (0, 0.97)], paint)
    b.cylinder((0, 0, 0.99), neck * 0.85, 0.08, blotches((0.8, 0.62, 0.4), (0.6, 0.43, 0.25), 40, _seed(rng)))


def tree(b: Builder, rng: Random) -> None:
    """A fir in tiers or a round leafy tree."""
    seed = _seed(rng)
    bark = wood((0.5, 0.36, 0.24), (0.34, 0.23, 0.15), seed, 2)
    b.lathe((0, 0, 0), [(0.11, 0), (0.07, 0.12), (0.055, 0.4)], bark, smooth=True)
    if rng.random() < 0.5:
        hue = rng.uniform(0.32, 0.42)
        leaf = blotches(hsv(hue, 0.6, 0.52), hsv(hue, 0.65, 0.33), 26, seed)
        for k in range(4):
            r, z = 0.36 - 0.07 * k, 0.22 + 0.21 * k
            b.lathe(
                (0, 0, 0), [(0.04, z + 0.03), (r, z), (r * 0.97, z + 0.02), (r * 0.35, z + 0.24), (0, z + 0.32)], leaf
            )
        b.ball((0, 0, 1.2), 0.04, plain((1.0, 0.85, 0.3)))
    else:
        hue = float(rng.choice([0.27, 0.3, 0.08, 0.95]))
        leaf = blotches(hsv(hue, 0.6, 0.72), hsv(hue + 0.03, 0.68, 0.45), 16, seed)
        b.ball((0, 0, 0.7), 0.3, leaf)
        for k in range(6):
            angle, z = k * np.pi / 3, 0.62 + 0.12 * (k % 2)
            b.ball((0.22 * np.cos(angle), 0.22 * np.sin(angle), z), rng.uniform(0.15, 0.21), leaf)
        b.ball((0.03, 0, 0.93), 0.19, leaf)


def car(b: Builder, rng: Random) -> None:
    """A toy car that drives to the left."""
    paint, glass = plain(_bright(rng, 0.75), 0.05), blotches((0.3, 0.42, 0.52), (0.62, 0.78, 0.88), 4, _seed(rng))
    b.box((0, 0, 0.2), (1.0, 0.46, 0.19), paint, 0.07)
    b.box((0.06, 0, 0.36), (0.56, 0.4, 0.2), paint, 0.08)
    for y in (-1, 1):
        b.box((-0.07, y * 0.19, 0.365), (0.2, 0.04, 0.12), glass, 0.018)
        b.box((0.17, y * 0.19, 0.365), (0.2, 0.04, 0.12), glass, 0.018)
        b.box((0, y * 0.228, 0.2), (0.7, 0.015, 0.025), plain(_CREAM, 0), 0.006)
        for x in (-0.3, 0.3):
            b.cylinder((x, y * 0.2, 0.13), 0.13, 0.1, plain(_DARK, 0.3), turn(90, "x"))
            b.cylinder((x, y * 0.235, 0.13), 0.07, 0.05, plain((0.8, 0.81, 0.84), 0.2), turn(90, "x"))
        b.ball((-0.49, y * 0.15, 0.22), 0.045, plain((1.0, 0.95, 0.7), 0))
        b.ball((0.49, y * 0.15, 0.22), 0.035, plain((0.85, 0.15, 0.12), 0))
    for x in (-0.2, 0.32):
        b.box((x, 0, 0.37), (0.05, 0.32, 0.12), glass, 0.02, turn(-14 if x < 0 else 14, "y"))
    b.box((-0.5, 0, 0.15), (0.04, 0.4, 0.05), plain((0.75, 0.76, 0.8), 0.1), 0.02)


def cake(b: Builder, rng: Random) -> None:
    """Tiers with frosting, sprinkles and a candle."""
    icing, sponge, seed = _bright(rng, 0.32, 0.97), (0.88, 0.68, 0.42), _seed(rng)
    b.lathe((0, 0, 0), [(0, 0), (0.46, 0), (0.5, 0.03), (0.48, 0.04), (0, 0.035)], plain(_CREAM))
    bottom = 0.035
    for r, h in ((0.4, 0.24), (0.29, 0.2), (0.18, 0.16))[: int(rng.integers(2, 4))]:
        top = dots(icing, _bright(rng, 0.7), 0.09, seed)
        side = by_height([(bottom + h * 0.28, plain(sponge, 0.3)), (bottom + h * 0.38, plain(_CREAM)), (9, top)])
        b.lathe((0, 0, bottom), [(r, 0), (r, h - 0.03), (r - 0.03, h), (0, h)], side)
        for k in range(14):
            angle = 2 * np.pi * k / 14
            b.ball((r * np.cos(angle), r * np.sin(angle), bottom + 0.02), 0.036, plain(_CREAM, 0.1))
        bottom += h
    b.cylinder((0, 0, bottom + 0.09), 0.022, 0.18, stripes(_bright(rng), _CREAM, 0.06))
    b.ball((0, 0, bottom + 0.22), 0.026, plain((1.0, 0.75, 0.2), 0), 1.8)


def bookshelf(b: Builder, rng: Random) -> None:
    """Shelves with books."""
    timber, upright = _timber(rng), _timber(rng, 2)
    for x in (-0.36, 0.36):
        b.box((x, 0, 0.5), (0.04, 0.26, 1.0), upright, 0.008)
    b.box((0, 0.12, 0.5), (0.7, 0.02, 0.98), upright, 0.004)
    for z in (0.04, 0.35, 0.66, 0.98):
        b.box((0, 0, z), (0.72, 0.26, 0.035), timber, 0.008)
    for z in (0.058, 0.368, 0.678):
        x = -0.33
        while x < 0.27:
            thick, high = rng.uniform(0.035, 0.07), rng.uniform(0.17, 0.26)
            cover = _bright(rng, rng.uniform(0.3, 0.75), rng.uniform(0.5, 0.9))
            spine = by_height([(z + high * 0.2, plain(cover)), (z + high * 0.28, plain(_CREAM)), (9, plain(cover))])
            b.box((x + thick / 2, -0.01, z + high / 2), (thick - 0.004, 0.19, high), spine, 0.006)
            x += thick


def sailboat(b: Builder, rng: Random) -> None:
    """A hull, a mast and two sails."""
    hull, sail = _bright(rng, 0.7, 0.75), stripes(_CREAM, _bright(rng, 0.7), 0.16, int(rng.integers(2)))
    upright, timber = np.eye(3), _timber(rng)

    def rib(length: float, width: float, z: float) -> list[tuple[float, float, float]]:
        return [(length, width, z), (length, -width, z)]

    for low, high, colour in ((0.0, 0.16, hull), (0.16, 0.22, _CREAM)):
        grow = 0.5 * low / 0.22 + 0.5, 0.5 * high / 0.22 + 0.5
        stern, bow = ([rib(x * g, 0.19 * g, z) for g, z in zip(grow, (low, high), strict=True)] for x in (-0.4, 0.15))
        tip = [rib(0.56 * g, 0.004, z) for g, z in zip(grow, (low, high), strict=True)]
        b.slab([stern, bow], plain(colour))
        b.slab([bow, tip], plain(colour))
    b.box((-0.12, 0, 0.22), (0.5, 0.3, 0.02), timber, 0.008)
    b.box((-0.18, 0, 0.26), (0.24, 0.18, 0.1), plain(_CREAM), 0.025)
    b.cylinder((0.06, 0, 0.68), 0.016, 0.98, _timber(rng, 2))
    b.plate([(-0.38, 0.36), (0.03, 0.36), (0.03, 1.12), (0.02, 1.12)], 0.014, sail, upright)
    b.plate([(0.1, 0.32), (0.5, 0.28), (0.1, 1.05), (0.1, 1.05)], 0.014, plain(_CREAM), upright)
    b.tube([(-0.4, 0, 0.345), (-0.15, 0, 0.345), (0.06, 0, 0.345)], 0.013, timber)
    b.plate([(0.07, 1.13), (0.2, 1.15), (0.2, 1.15), (0.07, 1.17)], 0.012, plain(hull), upright)


def barrel(b: Builder, rng: Random) -> None:
    """A barrel of staves with iron hoops."""
    staves, iron = _timber(rng, 2), plain((0.32, 0.33, 0.37), 0.3)
    hooped = by_height(
        [(0.08, iron), (0.28, staves), (0.34, iron), (0.66, staves), (0.72, iron), (0.92, staves), (9, iron)]
    )
    b.lathe((0, 0, 0), [(0.29, 0), (0.36, 0.25), (0.385, 0.5), (0.36, 0.75), (0.29, 1.0)], hooped, smooth=True)
    for z in (0.03, 0.97):
        b.lathe((0, 0, z), [(0.3, 0), (0, 0)] if z > 0.5 else [(0, 0), (0.3, 0)], _timber(rng))


FAMILIES: dict[str, Callable[[Builder, Random], None]] = {
    function.__name__: function
    for function in (
        chair,
        mug,
        house,
        rocket,
        mushroom,
        robot,
        table,
        lamp,
        bottle,
        tree,
        car,
        cake,
        bookshelf,
        sailboat,
        barrel,
    )
}
