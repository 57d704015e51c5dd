"""The .ply of 3D Gaussian splatting (Kerbl et al. 2023), degrees 0..3.

Columns, float32: x y z (nx ny nz) f_dc_0..2 f_rest_0..3(K-1)-1 opacity scale_0..2 rot_0..3. Opacity is stored as logit,
scale as natural logarithm, rot as w x y z of any length; f_rest runs coefficient by coefficient within one channel.
A file with packed chunks is handed to `_compressed_ply`.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from gs_render._formats._arrays import logit, sigmoid
from gs_render._formats._compressed_ply import decode
from gs_render._formats._ply_table import read_elements, write_elements
from gs_render._gaussians import Gaussians

_BASE = ("x", "y", "z", "f_dc_0", "f_dc_1", "f_dc_2", "opacity", "scale_0", "scale_1", "scale_2")
_ROTATION = ("rot_0", "rot_1", "rot_2", "rot_3")


def read(path: Path) -> Gaussians:
    """Gaussians in the frame of the file, activated."""
    tables = read_elements(path)
    if "chunk" in tables:
        return decode(tables, path)
    if "vertex" not in tables:
        raise ValueError(f"{path}: PLY without an element 'vertex'; it has {sorted(tables) or 'none'}")
    table = tables["vertex"]
    names = set(table.dtype.names or ())
    missing = [name for name in (*_BASE, *_ROTATION) if name not in names]
    if missing:
        raise ValueError(f"{path}: not a Gaussian splatting PLY: columns {', '.join(missing)} are missing")
    rest = sum(name.startswith("f_rest_") for name in names)
    if rest not in (0, 9, 24, 45) or any(f"f_rest_{i}" not in names for i in range(rest)):
        raise ValueError(f"{path}: {rest} columns f_rest_*; expected f_rest_0 .. of 0, 9, 24 or 45 (degree 0..3)")

    def columns(*wanted: str) -> np.ndarray:
        if not wanted:
            return np.zeros((len(table), 0), np.float32)
        with np.errstate(over="ignore", invalid="ignore"):
            return np.stack([table[name].astype(np.float32) for name in wanted], axis=1)

    higher = columns(*(f"f_rest_{i}" for i in range(rest))).reshape(len(table), 3, rest // 3).transpose(0, 2, 1)
    sh = np.concatenate([columns("f_dc_0", "f_dc_1", "f_dc_2")[:, None, :], higher], axis=1)
    with np.errstate(over="ignore", invalid="ignore"):
        scales = np.exp(columns("scale_0", "scale_1", "scale_2"))
    fields = (columns("x", "y", "z"), scales, columns(*_ROTATION), sigmoid(columns("opacity")[:, 0]), sh)
    return Gaussians(*(torch.from_numpy(np.ascontiguousarray(field)) for field in fields))


def write(gaussians: Gaussians, path: Path) -> None:
    """Write Gaussians that are in the frame of the file already. Normals are written as zeros, as 3DGS does."""
    count, rest = len(gaussians), 3 * (gaussians.sh.shape[1] - 1)
    names = ["x", "y", "z", "nx", "ny", "nz", "f_dc_0", "f_dc_1", "f_dc_2"]
    names += [f"f_rest_{i}" for i in range(rest)]
    names += ["opacity", "scale_0", "scale_1", "scale_2", *_ROTATION]
    columns = [
        gaussians.means.numpy(),
        np.zeros((count, 3), np.float32),
        gaussians.sh[:, 0].numpy(),
        gaussians.sh[:, 1:].mT.reshape(count, rest).numpy(),
        logit(gaussians.opacities.numpy())[:, None],
        np.log(np.maximum(gaussians.scales.numpy(), 1e-20)),
        gaussians.quaternions.numpy(),
    ]
    table = np.concatenate(columns, axis=1, dtype=np.float32).view([(name, "<f4") for name in names])[:, 0]
    write_elements(path, {"vertex": table})
