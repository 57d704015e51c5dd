"""Augmentations that act on a whole object, its pictures, cameras and voxels alike, exactly."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor


def hue_matrix(degrees: float | Float[Tensor, " B"]) -> Float[Tensor, "*B 3 3"]:
    """Rotation of RGB about the grey axis: greys (and a white background) stay, hues turn. ``M @ rgb``, then clamp."""
    angle = torch.as_tensor(degrees, dtype=torch.float32) * (math.pi / 180)
    cos, sin = angle.cos()[..., None, None], angle.sin()[..., None, None]
    eye = torch.eye(3, device=angle.device)
    third = torch.full((3, 3), 1 / 3, device=angle.device)
    cross = torch.tensor([[0.0, -1.0, 1.0], [1.0, 0.0, -1.0], [-1.0, 1.0, 0.0]], device=angle.device) / math.sqrt(3)
    return cos * eye + (1 - cos) * third + sin * cross


def shift_hue(images: Float[Tensor, "B 3 H W"], matrix: Float[Tensor, "*B 3 3"]) -> Float[Tensor, "B 3 H W"]:
    """Images with their hue turned by one matrix a picture (or one for all), clamped to [0, 1]."""
    return torch.einsum("...ij,...jhw->...ihw", matrix.to(images.dtype), images).clamp(0, 1)


def yaw_coords(coords: Int[Tensor, "L 3"], quarter_turns: int, grid_size: int) -> Int[Tensor, "L 3"]:
    """Voxels turned by ``quarter_turns`` x 90 degrees counter-clockwise about z (seen from above)."""
    x, y, z = coords.unbind(-1)
    last = grid_size - 1
    x, y = [(x, y), (last - y, x), (last - x, last - y), (y, last - x)][quarter_turns % 4]
    return torch.stack([x, y, z], -1)


def yaw_matrix(quarter_turns: int) -> Float[Tensor, "4 4"]:
    """World transform of :func:`yaw_coords`; a camera follows with ``world_to_camera @ inverse``."""
    c, s = [(1.0, 0.0), (0.0, 1.0), (-1.0, 0.0), (0.0, -1.0)][quarter_turns % 4]
    matrix = torch.eye(4)
    matrix[:2, :2] = torch.tensor([[c, -s], [s, c]])
    return matrix


def turn_cameras(world_to_camera: Float[Tensor, "V 4 4"], quarter_turns: int) -> Float[Tensor, "V 4 4"]:
    """The cameras that see the turned object as the given ones saw it before."""
    return world_to_camera @ yaw_matrix(quarter_turns).mT.to(world_to_camera)


def mirror_coords(coords: Int[Tensor, "L 3"], grid_size: int) -> Int[Tensor, "L 3"]:
    """Voxels mirrored in x; pictures follow by a left-right flip, cameras by :func:`mirror_cameras`."""
    return torch.stack([grid_size - 1 - coords[:, 0], coords[:, 1], coords[:, 2]], -1)


def mirror_cameras(world_to_camera: Float[Tensor, "V 4 4"]) -> Float[Tensor, "V 4 4"]:
    """Cameras that see the object mirrored in x as the flipped pictures of the given ones (principal point centred)."""
    flip = torch.diag(torch.tensor([-1.0, 1.0, 1.0, 1.0])).to(world_to_camera)
    return flip @ world_to_camera @ flip


def snap_quarter_turns(azimuth_degrees: float) -> int:
    """Quarter turns that bring a condition camera to within 45 degrees of the front (frame ``view-snapped``)."""
    return -round(azimuth_degrees / 90) % 4
