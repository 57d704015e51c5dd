"""The .splat of antimatter15's viewer: 32 bytes a Gaussian, no header.

float32 x y z, float32 standard deviations, uint8 r g b opacity, uint8 rotation wxyz as 128 + 128 q. Opaque and large
Gaussians come first, so that a viewer may show a part of the file.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from gs_render._formats._arrays import unit_quaternions
from gs_render._gaussians import Gaussians
from gs_render._sh import SH_C0

_ROW = np.dtype([("position", "<f4", 3), ("scale", "<f4", 3), ("color", "u1", 4), ("rotation", "u1", 4)])


def read(path: Path) -> Gaussians:
    """Gaussians in the frame of the file."""
    data = path.read_bytes()
    if len(data) % _ROW.itemsize:
        raise ValueError(
            f"{path}: {len(data)} bytes are no whole number of {_ROW.itemsize}-byte rows: not a .splat file"
        )
    table = np.frombuffer(data, _ROW)
    color = table["color"] / np.float32(255)
    sh = ((color[:, :3] - np.float32(0.5)) / np.float32(SH_C0))[:, None, :]
    rotation = (table["rotation"].astype(np.float32) - 128) / 128
    rotation[(rotation == 0).all(axis=1), 0] = 1  # four bytes of 128 are written for "no rotation" by some programs
    fields = (table["position"], table["scale"], rotation, color[:, 3], sh)
    return Gaussians(*(torch.from_numpy(np.array(field, dtype=np.float32, order="C")) for field in fields))


def write(gaussians: Gaussians, path: Path) -> None:
    """Write Gaussians that are in the frame of the file already."""
    scales, opacities = gaussians.scales.numpy(), gaussians.opacities.numpy()
    table = np.zeros(len(gaussians), _ROW)
    table["position"], table["scale"] = gaussians.means.numpy(), scales
    color = np.concatenate([gaussians.rgb.numpy(), opacities[:, None]], axis=1)
    table["color"] = np.rint(color.clip(0, 1) * 255)
    table["rotation"] = np.rint(unit_quaternions(gaussians.quaternions.numpy()) * 128 + 128).clip(0, 255)
    order = np.argsort(-scales.prod(axis=1) * opacities, kind="stable")
    path.write_bytes(table[order].tobytes())
