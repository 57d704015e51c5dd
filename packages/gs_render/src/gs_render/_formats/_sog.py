"""The .sog of PlayCanvas, version 2: a zip of meta.json and lossless WebP pictures, one pixel a Gaussian.

Reads degrees 0..3, writes degree 0: the palette of higher harmonics would need a clustering of its own.
"""

from __future__ import annotations

import io
import json
import math
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from gs_render._formats._arrays import from_smallest_three, morton_order, smallest_three
from gs_render._gaussians import Gaussians

_REST = (0, 3, 8, 15)
_FREE_COUNT = 1 << 18  # Gaussians that any file may claim; beyond, it needs a byte for each
_MAX_META = 4 << 20


def read(path: Path) -> Gaussians:
    """Gaussians in the frame of the file."""
    data = path.read_bytes()
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            return _read_archive(archive, len(data), path)
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, NotImplementedError, RuntimeError) as error:
        raise ValueError(f"{path}: damaged SOG archive: {error}") from error
    except (KeyError, IndexError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"{path}: damaged SOG description: {type(error).__name__}: {error}") from error


def _read_archive(archive: zipfile.ZipFile, size: int, path: Path) -> Gaussians:
    meta = json.loads(_member(archive, "meta.json", _MAX_META, path))
    if not isinstance(meta, dict) or meta.get("version") != 2:
        raise ValueError(
            f"{path}: SOG version {meta.get('version') if isinstance(meta, dict) else None}; only 2 is read"
        )
    count = meta["count"]
    if not isinstance(count, int) or not 0 <= count <= max(_FREE_COUNT, size):
        raise ValueError(f"{path}: {count} Gaussians claimed by a SOG file of {size} bytes")

    def picture(entry: dict[str, Any], index: int, pixels: int = count) -> np.ndarray:
        return _picture(archive, entry["files"][index], pixels, path)

    low, high = (picture(meta["means"], index)[:count, :3].astype(np.uint16) for index in (0, 1))
    minimum, maximum = (np.array(meta["means"][key], np.float32).reshape(3) for key in ("mins", "maxs"))
    logs = minimum + (maximum - minimum) * ((low | high << 8) / np.float32(65535))
    quats = picture(meta["quats"], 0)[:count]
    largest = quats[:, 3].astype(np.int64) - 252
    if count and not largest.min() >= 0:
        raise ValueError(f"{path}: damaged SOG: a rotation with tag {int(largest.min()) + 252}; expected 252..255")
    others = (quats[:, :3] / np.float32(127.5) - 1) * np.float32(np.sqrt(0.5))
    colors = picture(meta["sh0"], 0)[:count]
    sh = [_codebook(meta["sh0"], path)[colors[:, :3]][:, None, :]]
    if meta.get("shN"):
        sh.append(_read_rest(meta["shN"], picture, count, path))
    with np.errstate(over="ignore", invalid="ignore"):
        fields = (
            np.sign(logs) * np.expm1(np.abs(logs)),
            np.exp(_codebook(meta["scales"], path)[picture(meta["scales"], 0)[:count, :3]]),
            from_smallest_three(largest, others),
            colors[:, 3] / np.float32(255),
            np.concatenate(sh, axis=1),
        )
    return Gaussians(*(torch.from_numpy(np.array(field, dtype=np.float32, order="C")) for field in fields))


def _read_rest(entry: dict[str, Any], picture, count: int, path: Path) -> np.ndarray:
    """[N, K - 1, 3] of the palette; 64 entries stand in each row of its picture."""
    bands, palette = entry["bands"], entry["count"]
    if bands not in (1, 2, 3) or not isinstance(palette, int) or not 0 < palette <= 1 << 16:
        raise ValueError(f"{path}: damaged SOG: palette of {palette} entries for {bands} bands")
    rest = _REST[bands]
    rows = -(-palette // 64)
    texels = picture(entry, 0, rows * 64 * rest)[: rows * 64 * rest, :3].reshape(-1, rest, 3)
    labels = picture(entry, 1)[:count].astype(np.int64)
    index = labels[:, 0] | labels[:, 1] << 8
    if count and index.max() >= palette:
        raise ValueError(f"{path}: damaged SOG: palette entry {int(index.max())} of {palette}")
    return _codebook(entry, path)[texels][index]


def _codebook(entry: dict[str, Any], path: Path) -> np.ndarray:
    values = np.array(entry["codebook"], np.float32)
    if values.shape != (256,):
        raise ValueError(f"{path}: damaged SOG: codebook of shape {values.shape}; expected 256 numbers")
    return values


def _member(archive: zipfile.ZipFile, name: str, limit: int, path: Path) -> bytes:
    """One file of the archive; never reads more than `limit` bytes, whatever the archive claims."""
    if not isinstance(name, str):
        raise ValueError(f"{path}: damaged SOG: a file name is a {type(name).__name__}")
    with archive.open(name) as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise ValueError(f"{path}: {name} unpacks to more than the {limit} bytes accepted")
    return data


def _picture(archive: zipfile.ZipFile, name: str, pixels: int, path: Path) -> np.ndarray:
    """[W * H, 4] bytes of a WebP picture that holds at least `pixels` and not far more."""
    data = _member(archive, name, 8 * pixels + (1 << 20), path)
    try:
        with Image.open(io.BytesIO(data), formats=["WEBP"]) as image:
            area = image.width * image.height
            if not pixels <= area <= 4 * pixels + (1 << 16):
                raise ValueError(f"{path}: {name} has {image.width} x {image.height} pixels for {pixels} entries")
            return np.asarray(image.convert("RGBA")).reshape(-1, 4)
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: {name} is not a readable WebP picture: {error}") from error


def write(gaussians: Gaussians, path: Path) -> None:
    """Write Gaussians that are in the frame of the file already, in Morton order, which WebP packs best."""
    gaussians = gaussians[torch.from_numpy(morton_order(gaussians.means.numpy()))]
    count = len(gaussians)
    width = max(4 * math.ceil(math.sqrt(count) / 4), 4)
    height = max(4 * math.ceil(count / width / 4), 4)
    means = gaussians.means.numpy()
    logs = np.sign(means) * np.log1p(np.abs(means))
    low, high = (logs.min(axis=0), logs.max(axis=0)) if count else (np.zeros(3), np.ones(3))
    steps = np.rint((logs - low) / np.maximum(high - low, 1e-30) * 65535).clip(0, 65535).astype(np.uint16)
    largest, others = smallest_three(gaussians.quaternions.numpy())
    quats = np.concatenate([np.rint((others * np.sqrt(2) + 1) * 127.5), 252 + largest[:, None]], axis=1)
    scale_book, scales = _quantize(np.log(np.maximum(gaussians.scales.numpy(), 1e-20)))
    color_book, colors = _quantize(gaussians.sh[:, 0].numpy())
    opacity = np.rint(gaussians.opacities.numpy() * 255)[:, None]
    opaque = np.full((count, 1), 255)
    pictures = {
        "means_l.webp": np.concatenate([steps & 255, opaque], axis=1),
        "means_u.webp": np.concatenate([steps >> 8, opaque], axis=1),
        "quats.webp": quats,
        "scales.webp": np.concatenate([scales, opaque], axis=1),
        "sh0.webp": np.concatenate([colors, opacity], axis=1),
    }
    meta = {
        "version": 2,
        "asset": {"generator": "gs-render"},
        "count": count,
        "means": {"mins": low.tolist(), "maxs": high.tolist(), "files": ["means_l.webp", "means_u.webp"]},
        "scales": {"codebook": scale_book.tolist(), "files": ["scales.webp"]},
        "quats": {"files": ["quats.webp"]},
        "sh0": {"codebook": color_book.tolist(), "files": ["sh0.webp"]},
    }
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("meta.json", json.dumps(meta))
        for name, rows in pictures.items():
            pixels = np.zeros((height * width, 4), np.uint8)
            pixels[:count] = rows.clip(0, 255)
            buffer = io.BytesIO()
            image = Image.fromarray(pixels.reshape(height, width, 4), "RGBA")
            image.save(buffer, "WEBP", lossless=True, exact=True, method=4)
            archive.writestr(name, buffer.getvalue())


def _quantize(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(256 levels, sorted; index of the nearest one): Lloyd's algorithm in one dimension from evenly spread levels."""
    if not values.size:
        return np.linspace(0, 1, 256, dtype=np.float32), np.zeros(values.shape, np.uint8)
    line = np.sort(values.reshape(-1).astype(np.float64))
    sums = np.concatenate([[0.0], np.cumsum(line)])
    levels = np.linspace(line[0], line[-1], 256)
    for _ in range(12):
        edges = np.concatenate([[0], np.searchsorted(line, (levels[1:] + levels[:-1]) / 2), [len(line)]])
        counts = np.diff(edges)
        levels = np.where(counts > 0, np.diff(sums[edges]) / np.maximum(counts, 1), levels)
    middle = ((levels[1:] + levels[:-1]) / 2).astype(np.float32)
    return levels.astype(np.float32), np.searchsorted(middle, values).astype(np.uint8)
