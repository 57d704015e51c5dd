"""Quaternions (w, x, y, z) and rotation matrices."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor


def normalize_quaternions(quaternions: Float[Tensor, "*n 4"]) -> Float[Tensor, "*n 4"]:
    """Unit length. A zero quaternion stays zero."""
    return torch.nn.functional.normalize(quaternions, dim=-1, eps=torch.finfo(quaternions.dtype).tiny)


def quaternion_to_matrix(quaternions: Float[Tensor, "*n 4"]) -> Float[Tensor, "*n 3 3"]:
    """Rotation matrices of quaternions wxyz of any length but zero."""
    w, x, y, z = normalize_quaternions(quaternions).unbind(-1)
    rows = (
        1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y),
        2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x),
        2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y),
    )  # fmt: skip
    return torch.stack(rows, dim=-1).unflatten(-1, (3, 3))


def matrix_to_quaternion(matrix: Float[Tensor, "*n 3 3"]) -> Float[Tensor, "*n 4"]:
    """Quaternions wxyz with w >= 0 of rotation matrices (Shepperd: divide by the largest component)."""
    m = matrix
    xx, yy, zz = m[..., 0, 0], m[..., 1, 1], m[..., 2, 2]
    # Row i of `table` is 4 q_i q: picking the row of the largest q_i keeps the division well conditioned.
    wx, wy, wz = m[..., 2, 1] - m[..., 1, 2], m[..., 0, 2] - m[..., 2, 0], m[..., 1, 0] - m[..., 0, 1]
    xy, xz, yz = m[..., 0, 1] + m[..., 1, 0], m[..., 0, 2] + m[..., 2, 0], m[..., 1, 2] + m[..., 2, 1]
    table = torch.stack(
        [
            torch.stack([1 + xx + yy + zz, wx, wy, wz], dim=-1),
            torch.stack([wx, 1 + xx - yy - zz, xy, xz], dim=-1),
            torch.stack([wy, xy, 1 - xx + yy - zz, yz], dim=-1),
            torch.stack([wz, xz, yz, 1 - xx - yy + zz], dim=-1),
        ],
        dim=-2,
    )
    best = table.diagonal(dim1=-2, dim2=-1).argmax(dim=-1)
    row = table.gather(-2, best[..., None, None].expand(*best.shape, 1, 4)).squeeze(-2)
    quaternion = normalize_quaternions(row)
    return torch.where(quaternion[..., :1] < 0, -quaternion, quaternion)


def quaternion_multiply(a: Float[Tensor, "*n 4"], b: Float[Tensor, "*n 4"]) -> Float[Tensor, "*n 4"]:
    """The rotation b followed by the rotation a (Hamilton product, wxyz)."""
    aw, ax, ay, az = a.unbind(-1)
    bw, bx, by, bz = b.unbind(-1)
    return torch.stack(
        [
            aw * bw - ax * bx - ay * by - az * bz,
            aw * bx + ax * bw + ay * bz - az * by,
            aw * by - ax * bz + ay * bw + az * bx,
            aw * bz + ax * by - ay * bx + az * bw,
        ],
        dim=-1,
    )


def to_rotation_matrix(
    rotation: Tensor | Sequence, dtype: torch.dtype, device: torch.device
) -> tuple[Float[Tensor, "3 3"], Float[Tensor, 4]]:
    """(matrix, quaternion) of a rotation given as either; ValueError if it is no proper rotation."""
    value = torch.as_tensor(rotation, dtype=dtype, device=device)
    if value.shape == (4,):
        return quaternion_to_matrix(value), normalize_quaternions(value)
    if value.shape != (3, 3):
        raise ValueError(f"rotation: expected a [3, 3] matrix or a [4] quaternion wxyz, got shape {tuple(value.shape)}")
    error = float((value @ value.mT - torch.eye(3, dtype=dtype, device=device)).abs().max().detach())
    if error > 1e-3 or float(torch.linalg.det(value.detach().cpu().double())) < 0:
        raise ValueError(f"rotation: the matrix is not a proper rotation (R R^T differs from 1 by {error:.2g})")
    return value, matrix_to_quaternion(value)
