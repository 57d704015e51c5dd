"""Which axis of a file points up, and the rotations between file frames and the world (z up)."""

from __future__ import annotations

from typing import Literal

from gs_render._gaussians import Gaussians

Up = Literal["z", "y", "-y"]

# World (z up, front -y) -> file. "y": glTF, front +z. "-y": the camera frame of splat viewers, front -z.
_TO_FILE: dict[str, list[list[float]] | None] = {
    "z": None,
    "y": [[1, 0, 0], [0, 0, 1], [0, -1, 0]],
    "-y": [[1, 0, 0], [0, 0, -1], [0, 1, 0]],
}


def to_file_axes(gaussians: Gaussians, up: Up) -> Gaussians:
    """World -> a frame in which the axis `up` points up."""
    return gaussians.transform(file_rotation(up)) if file_rotation(up) else gaussians


def from_file_axes(gaussians: Gaussians, up: Up) -> Gaussians:
    """A frame in which the axis `up` points up -> world."""
    matrix = file_rotation(up)
    return gaussians.transform([list(column) for column in zip(*matrix, strict=True)]) if matrix else gaussians


def file_rotation(up: str) -> list[list[float]] | None:
    """Rotation matrix world -> file, None if they are the same."""
    if up not in _TO_FILE:
        raise ValueError(f"up: expected 'z', 'y' or '-y' (the axis of the file that points up), got {up!r}")
    return _TO_FILE[up]
