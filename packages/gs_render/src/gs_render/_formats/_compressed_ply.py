"""Compressed .ply of PlayCanvas / SuperSplat: 16 bytes a Gaussian, in chunks of 256 with their own bounds.

Words of a vertex: position and log-scale 11 + 10 + 11 bits between the chunk's bounds, rotation as index of its largest
component and three times 10 bits, colour and opacity 4 x 8 bits. Harmonics of degree 1..3 follow as bytes over -4..4.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from gs_render._formats._arrays import morton_order, pack_rotation, unpack_rotation
from gs_render._formats._ply_table import read_elements, write_elements
from gs_render._gaussians import Gaussians
from gs_render._sh import SH_C0

_CHUNK = 256
_BOUNDS = tuple(
    f"{end}_{name}"
    for names in (("x", "y", "z"), ("scale_x", "scale_y", "scale_z"), ("r", "g", "b"))
    for end in ("min", "max")
    for name in names
)
_WORDS = ("packed_position", "packed_rotation", "packed_scale", "packed_color")
_SCALE_LIMIT = 20.0  # bounds of the natural logarithm, as other writers keep them
_SH_RANGE = 8.0


def read(path: Path) -> Gaussians:
    """Gaussians in the frame of the file."""
    return decode(read_elements(path), path)


def decode(tables: dict[str, np.ndarray], path: Path) -> Gaussians:
    """Unpack the elements of a compressed file."""
    chunk, vertex = tables.get("chunk"), tables.get("vertex")
    if chunk is None or vertex is None or any(name not in (vertex.dtype.names or ()) for name in _WORDS):
        raise ValueError(
            f"{path}: not a compressed PLY: expected elements 'chunk' and 'vertex' with {', '.join(_WORDS)}"
        )
    count = len(vertex)
    if len(chunk) != -(-count // _CHUNK):
        raise ValueError(f"{path}: {len(chunk)} chunks for {count} Gaussians; expected one for every {_CHUNK}")
    names = chunk.dtype.names or ()
    if any(name not in names for name in _BOUNDS[:12]):
        raise ValueError(f"{path}: the chunks lack bounds of position or scale; they have {', '.join(names)}")
    has_color = all(name in names for name in _BOUNDS[12:])  # files of the first version have none
    rows = np.arange(count) // _CHUNK

    def bounds(*columns: str) -> np.ndarray:
        return np.stack([chunk[name].astype(np.float32) for name in columns], axis=1)[rows]

    words = {name: vertex[name].astype(np.uint32) for name in _WORDS}
    color = np.stack([(words["packed_color"] >> shift) & 255 for shift in (24, 16, 8, 0)], axis=1) / np.float32(255)
    rgb = color[:, :3]
    with np.errstate(over="ignore", invalid="ignore"):
        if has_color:
            rgb = _between(rgb, bounds(*_BOUNDS[12:15]), bounds(*_BOUNDS[15:18]))
        means = _between(_split(words["packed_position"]), bounds(*_BOUNDS[0:3]), bounds(*_BOUNDS[3:6]))
        scales = np.exp(_between(_split(words["packed_scale"]), bounds(*_BOUNDS[6:9]), bounds(*_BOUNDS[9:12])))
    sh = np.concatenate([((rgb - 0.5) / SH_C0)[:, None, :], _decode_sh(tables.get("sh"), count, path)], axis=1)
    fields = (means, scales, unpack_rotation(words["packed_rotation"]), color[:, 3], sh)
    return Gaussians(*(torch.from_numpy(np.ascontiguousarray(field, dtype=np.float32)) for field in fields))


def write(gaussians: Gaussians, path: Path) -> None:
    """Write Gaussians that are in the frame of the file, reordered along a Morton curve to keep chunks small."""
    order = morton_order(gaussians.means.numpy())
    gaussians = gaussians[torch.from_numpy(order)]
    count = len(gaussians)
    starts = np.arange(0, count, _CHUNK)
    rows = np.arange(count) // _CHUNK
    logs = np.log(np.maximum(gaussians.scales.numpy(), 1e-20)).clip(-_SCALE_LIMIT, _SCALE_LIMIT)
    chunk = np.zeros(len(starts), [(name, "<f4") for name in _BOUNDS])
    units = []
    for index, values in enumerate((gaussians.means.numpy(), logs, gaussians.rgb.numpy())):
        low, high = (f.reduceat(values, starts) if count else values for f in (np.minimum, np.maximum))
        for column in range(3):
            chunk[_BOUNDS[6 * index + column]] = low[:, column]
            chunk[_BOUNDS[6 * index + 3 + column]] = high[:, column]
        units.append((values - low[rows]) / np.maximum(high - low, 1e-30)[rows])
    color = np.concatenate([units[2], gaussians.opacities.numpy()[:, None]], axis=1)
    color8 = np.rint(color.clip(0, 1) * 255).astype(np.uint32)
    vertex = np.zeros(count, [(name, "<u4") for name in _WORDS])
    vertex["packed_position"], vertex["packed_scale"] = _join(units[0]), _join(units[1])
    vertex["packed_rotation"] = pack_rotation(gaussians.quaternions.numpy())
    vertex["packed_color"] = color8[:, 0] << 24 | color8[:, 1] << 16 | color8[:, 2] << 8 | color8[:, 3]
    elements = {"chunk": chunk, "vertex": vertex}
    if gaussians.sh_degree:
        rest = gaussians.sh[:, 1:].mT.reshape(count, -1).numpy()
        bytes_ = np.floor((rest / _SH_RANGE + 0.5) * 256).clip(0, 255).astype(np.uint8)
        elements["sh"] = bytes_.view([(f"f_rest_{i}", "u1") for i in range(rest.shape[1])])[:, 0]
    write_elements(path, elements)


def _decode_sh(table: np.ndarray | None, count: int, path: Path) -> np.ndarray:
    """[N, K - 1, 3] of the bytes; the ends of the range are exact, everything else is the middle of its step."""
    if table is None:
        return np.zeros((count, 0, 3), np.float32)
    names = [f"f_rest_{i}" for i in range(len(table.dtype.names or ()))]
    if len(table) != count or len(names) not in (9, 24, 45) or set(names) != set(table.dtype.names or ()):
        raise ValueError(
            f"{path}: element 'sh' has {len(table)} rows of {len(names)} columns; expected {count} rows of "
            "f_rest_0 .. (9, 24 or 45)"
        )
    stored = np.stack([table[name].astype(np.float32) for name in names], axis=1)
    unit = np.where(stored <= 0, 0, np.where(stored >= 255, 1, (stored + 0.5) / 256))
    return ((unit - 0.5) * _SH_RANGE).reshape(count, 3, -1).transpose(0, 2, 1).astype(np.float32)


def _between(unit: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    return low * (1 - unit) + high * unit


def _split(words: np.ndarray) -> np.ndarray:
    """[N, 3] in 0..1 of 11 + 10 + 11 bits."""
    parts = [
        (words >> 21) / np.float32(2047),
        ((words >> 11) & 1023) / np.float32(1023),
        (words & 2047) / np.float32(2047),
    ]
    return np.stack(parts, axis=1)


def _join(unit: np.ndarray) -> np.ndarray:
    x, y, z = (np.rint(unit[:, i].clip(0, 1) * top).astype(np.uint32) for i, top in enumerate((2047, 1023, 2047)))
    return x << 21 | y << 11 | z
