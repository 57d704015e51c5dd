"""Real spherical harmonics up to degree 3 in the basis and sign convention of 3DGS files."""

from __future__ import annotations

import functools

import torch
from jaxtyping import Float
from torch import Tensor

SH_C0 = 0.28209479177387814
MAX_DEGREE = 3


def num_coefficients(degree: int) -> int:
    """(degree + 1)^2 for a degree 0..3."""
    if not 0 <= degree <= MAX_DEGREE:
        raise ValueError(f"spherical harmonics: expected a degree 0..{MAX_DEGREE}, got {degree}")
    return (degree + 1) ** 2


def sh_basis(directions: Float[Tensor, "*n 3"], degree: int) -> Float[Tensor, "*n k"]:
    """Values of the (degree+1)^2 basis functions at unit directions. [..., 3] -> [..., K]."""
    x, y, z = directions.unbind(-1)
    basis = [torch.full_like(x, SH_C0)]
    if degree >= 1:
        c = 0.4886025119029199
        basis += [-c * y, c * z, -c * x]
    if degree >= 2:
        xx, yy, zz = x * x, y * y, z * z
        basis += [
            1.0925484305920792 * x * y,
            -1.0925484305920792 * y * z,
            0.31539156525252005 * (2 * zz - xx - yy),
            -1.0925484305920792 * x * z,
            0.5462742152960396 * (xx - yy),
        ]
    if degree >= 3:
        basis += [
            -0.5900435899266435 * y * (3 * xx - yy),
            2.890611442640554 * x * y * z,
            -0.4570457994644658 * y * (4 * zz - xx - yy),
            0.3731763325901154 * z * (2 * zz - 3 * xx - 3 * yy),
            -0.4570457994644658 * x * (4 * zz - xx - yy),
            1.445305721320277 * z * (xx - yy),
            -0.5900435899266435 * x * (xx - 3 * yy),
        ]
    return torch.stack(basis, dim=-1)


def evaluate_sh(sh: Float[Tensor, "n k 3"], directions: Float[Tensor, "n 3"]) -> Float[Tensor, "n 3"]:
    """Colours [N, 3] = max(0, 0.5 + sum_k sh_k Y_k(direction)); directions need not be unit vectors."""
    count = sh.shape[1]
    if count == 1:
        return (0.5 + SH_C0 * sh[:, 0]).clamp_min(0)
    unit = torch.nn.functional.normalize(directions, dim=-1)
    basis = sh_basis(unit, round(count**0.5) - 1)
    return (0.5 + torch.einsum("nk,nkc->nc", basis, sh)).clamp_min(0)


def rotate_sh(sh: Float[Tensor, "*n k 3"], rotation: Float[Tensor, "3 3"]) -> Float[Tensor, "*n k 3"]:
    """Coefficients of the function turned by `rotation`: evaluating the result at R d gives the input at d."""
    bands, start = [sh[..., :1, :]], 1
    degree = 1
    while start < sh.shape[-2]:
        stop = start + 2 * degree + 1
        matrix = _band_rotation(degree, rotation.cpu().double()).to(sh)  # MPS has no float64
        bands.append(matrix @ sh[..., start:stop, :])
        start, degree = stop, degree + 1
    return torch.cat(bands, dim=-2)


def _band_rotation(degree: int, rotation: Float[Tensor, "3 3"]) -> Float[Tensor, "m m"]:
    """Matrix of one band. 2 degree + 1 samples fix it: Y(R^T d) = Y(d) M for every direction d."""
    directions, inverse = _samples(degree)
    directions, inverse = directions.to(rotation), inverse.to(rotation)
    low = degree * degree
    return inverse @ sh_basis(directions @ rotation, degree)[:, low:]


@functools.cache
def _samples(degree: int) -> tuple[Tensor, Tensor]:
    """Directions spread over the sphere and the pseudo-inverse of one band's basis there (float64, CPU)."""
    index = torch.arange(64, dtype=torch.float64) + 0.5
    z = 1 - 2 * index / 64
    angle = index * torch.pi * (1 + 5**0.5)
    radius = (1 - z * z).sqrt()
    directions = torch.stack([radius * angle.cos(), radius * angle.sin(), z], dim=-1)
    return directions, torch.linalg.pinv(sh_basis(directions, degree)[:, degree * degree :])
