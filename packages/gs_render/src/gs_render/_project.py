"""EWA projection of 3D Gaussians to 2D ones in plain PyTorch, shared by the `torch` and the `cpu` backend.

Conventions of 3DGS (Kerbl et al. 2023); the clamp of the Jacobian and all thresholds are those of gsplat 1.5, so that
the three backends draw the same picture.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from gs_render._gaussians import Gaussians
from gs_render._rotation import quaternion_to_matrix
from gs_render._sh import evaluate_sh

NEAR = 0.01  # nearer than this in front of the camera a Gaussian is not drawn
MIN_ALPHA = 1 / 255  # contributions below are dropped: they would not change an 8-bit picture
MAX_ALPHA = 0.999  # keeps the transmittance positive
CLAMP_MARGIN = 0.15  # of the image side; the Jacobian is not evaluated farther outside
MIN_COMPENSATION = 1e-12  # keeps the root of the compensation differentiable at flat Gaussians
MIN_TRANSMITTANCE = 1e-4  # a pixel stops before the Gaussian that would bring it down to this


@dataclass(frozen=True)
class Projected:
    """N Gaussians as one camera sees them. Where `visible` is False the other values mean nothing."""

    means: Float[Tensor, "n 2"]  # pixels
    conics: Float[Tensor, "n 3"]  # inverse covariance (xx, xy, yy), 1 / pixels^2
    opacities: Float[Tensor, " n"]
    features: Float[Tensor, "n 4"]  # red, green, blue, depth
    reach: Float[Tensor, "n 2"]  # half sides of the box outside of which alpha < MIN_ALPHA, pixels
    visible: Bool[Tensor, " n"]


def project(
    gaussians: Gaussians,
    pose: Float[Tensor, "4 4"],
    intrinsics: Float[Tensor, "3 3"],
    size: tuple[int, int],
    filter_2d: float,
    antialias: bool,
) -> Projected:
    """Project for one camera; `size` is (width, height)."""
    axes = quaternion_to_matrix(gaussians.quaternions) * gaussians.scales[:, None, :]
    rotation, translation = pose[:3, :3], pose[:3, 3]
    local = gaussians.means @ rotation.mT + translation
    z = local[:, 2]
    in_front = z > NEAR
    ratio = local[:, :2] / torch.where(in_front, z, torch.ones_like(z))[:, None]
    focal = intrinsics.diagonal()[:2]
    centre = intrinsics[:2, 2]
    means = ratio * focal + centre
    first, second = _image_axes(axes, ratio, z, rotation, focal, centre, size, in_front)

    xx, xy, yy = (first * first).sum(-1), (first * second).sum(-1), (second * second).sum(-1)
    # |a x b|^2 is the determinant of the covariance without the cancellation of xx yy - xy^2 on needles.
    area = torch.linalg.cross(first, second).square().sum(-1)
    blurred_area = area + filter_2d * (xx + yy) + filter_2d * filter_2d
    drawable = in_front & (blurred_area > 0) & torch.isfinite(blurred_area)
    safe_area = torch.where(drawable, blurred_area, torch.ones_like(area))
    opacities = gaussians.opacities
    if antialias:
        # Mip-Splatting: the blur must not add energy.
        opacities = opacities * (area / safe_area).clamp_min(MIN_COMPENSATION).sqrt()
    conics = torch.stack([yy + filter_2d, -xy, xx + filter_2d], dim=-1) / safe_area[:, None]

    with torch.no_grad():
        extend = (2 * torch.log(opacities.clamp_min(MIN_ALPHA) / MIN_ALPHA)).sqrt()
        reach = extend[:, None] * (torch.stack([xx, yy], dim=-1) + filter_2d).sqrt()
        bounds = means.new_tensor(size)
        inside = ((means + reach > 0) & (means - reach < bounds)).all(dim=-1)
        visible = drawable & inside & (opacities >= MIN_ALPHA)

    return Projected(means, conics, opacities, features(gaussians, pose, z), reach, visible)


def features(gaussians: Gaussians, pose: Float[Tensor, "4 4"], depths: Float[Tensor, " n"]) -> Float[Tensor, "n 4"]:
    """[N, 4] what is blended: the colour that this camera sees, and the depth."""
    # Not -R^T t: the general inverse is what gsplat differentiates, and the two gradients differ where a step would
    # leave the rigid motions.
    camera_position = torch.linalg.inv(pose)[:3, 3]
    colors = evaluate_sh(gaussians.sh, gaussians.means - camera_position)
    return torch.cat([colors, depths[:, None]], dim=-1)


def _image_axes(
    axes: Tensor,
    ratio: Tensor,
    z: Tensor,
    rotation: Tensor,
    focal: Tensor,
    centre: Tensor,
    size: tuple[int, int],
    in_front: Tensor,
) -> tuple[Float[Tensor, "n 3"], Float[Tensor, "n 3"]]:
    """Rows of Jacobian x rotation x axes: a [N, 3] for x and for y, so that covariance = (a.a, a.b, b.b)."""
    bounds = ratio.new_tensor(size)
    # The linearisation explodes far outside of the picture.
    margin = CLAMP_MARGIN * bounds / focal
    clamped = torch.minimum(torch.maximum(ratio, -centre / focal - margin), (bounds - centre) / focal + margin)
    per_z = focal / torch.where(in_front, z, torch.ones_like(z))[:, None]
    rows = []
    for index in range(2):
        direction = (rotation[index] - clamped[:, index, None] * rotation[2]) * per_z[:, index, None]
        rows.append((direction[:, :, None] * axes).sum(dim=1))
    return rows[0], rows[1]
