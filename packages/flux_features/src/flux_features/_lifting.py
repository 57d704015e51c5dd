"""Multi-view feature lifting: each voxel gathers the features of the pixels it projects to.

Source: paper section 3.1 and TRELLIS ``dataset_toolkits/extract_feature.py`` (150 views, bilinear, plain mean over all
views, samples outside a frame count as zeros).
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from gs_render import Camera
from jaxtyping import Float, Int
from torch import Tensor

_CHUNK_SAMPLES = 2**20  # views x points at once: four rows of the table each, about 0.2 GB of indices and weights


def voxel_centres(coords: Int[Tensor, "L 3"], grid_size: int) -> Float[Tensor, "L 3"]:
    """World positions of voxel centres: ``(coords + 0.5) / grid_size - 0.5``."""
    return (coords.float() + 0.5) / grid_size - 0.5


def lift_features(
    feature_maps: Float[Tensor, "V C h w"],
    cameras: Camera,
    voxels: Float[Tensor, "L 3"],
    visibility: Literal["all", "depth"] = "all",
    *,
    depth: Float[Tensor, "V a b"] | None = None,
    depth_tolerance: float = 0.03,
    out_of_frame: Literal["zeros", "exclude"] = "zeros",
) -> Float[Tensor, "L C"]:
    """Mean over views of the bilinearly sampled feature at the projection of each voxel's centre.

    Differentiable in the feature maps, the centres and the cameras. Without gradients the memory beyond inputs and
    result is a copy of the maps and about 0.2 GB, whatever the number of views and voxels.

    Args:
        feature_maps: one map per view that tiles the whole image: cell (i, j) of h x w is centred at pixel
            ``((j + 0.5) width / w, (i + 0.5) height / h)``, pixel centres being at +0.5. Between cells features are
            interpolated; within half a cell of the image's edge they are those of the outermost cell.
        cameras: V cameras of ``cameras.width x cameras.height`` pixels.
        voxels: world positions of the centres, from :func:`voxel_centres`; any other points will do.
        visibility: ``"all"`` averages every view whether or not the surface hides the voxel (paper, TRELLIS);
            ``"depth"`` only views whose depth map says that it is not hidden. A voxel that no view sees falls back to
            all views.
        depth: view-space z of the nearest surface for ``"depth"``, any resolution, ``inf`` for background.
        depth_tolerance: world units by which a voxel may lie behind the recorded surface and still count as seen.
        out_of_frame: a projection outside the frame (or behind the camera) counts as a zero feature (TRELLIS), or is
            left out of the mean; a voxel outside every frame is zero. Under ``visibility="depth"`` it is always left
            out.

    Returns:
        Features ``[L, C]`` in the dtype of ``feature_maps``; positions, samples and sums are float32 or better.

    Raises:
        ValueError: numbers of views disagree, an option is unknown, or ``visibility="depth"`` has no depth maps.
    """
    _check(feature_maps, cameras, voxels, visibility, depth, out_of_frame)
    dtype = torch.promote_types(feature_maps.dtype, torch.float32)
    points = voxels.to(torch.promote_types(voxels.dtype, torch.float32))
    rows, columns = feature_maps.shape[-2:]
    table = feature_maps.to(dtype).permute(0, 2, 3, 1).flatten(0, 2)  # [V h w, C]: a sample reads whole rows
    matrix = _projection(cameras, points)
    nearest = depth.to(points) if visibility == "depth" and depth is not None else None
    parts = []
    for part in points.split(max(1, _CHUNK_SAMPLES // len(cameras))):
        x, y, z, inside = _project(matrix, cameras, part)
        every_view = inside if out_of_frame == "exclude" else torch.ones_like(inside)
        counted = every_view
        if nearest is not None:
            seen = inside & (z <= _at_pixels(nearest, x, y) + depth_tolerance)
            counted = torch.where(seen.any(0), seen, every_view)
        share = (counted & inside).to(points.dtype) / counted.sum(0).clamp_min(1)
        cells, weights = _bilinear(x, y, rows, columns)
        weights = (weights * share[..., None]).to(dtype)
        # One bag a point: the weighted sum of four cells in each of V views, without storing the samples.
        bags, shares = (value.transpose(0, 1).flatten(1) for value in (cells, weights))
        parts.append(F.embedding_bag(bags, table, mode="sum", per_sample_weights=shares))
    return torch.cat(parts).to(feature_maps.dtype)


def _check(
    feature_maps: Tensor, cameras: Camera, voxels: Tensor, visibility: str, depth: Tensor | None, out_of_frame: str
) -> None:
    if feature_maps.ndim != 4 or len(cameras) != len(feature_maps) or not len(cameras):
        raise ValueError(
            f"expected a feature map [V, C, h, w] for each camera, got {tuple(feature_maps.shape)} "
            f"and {len(cameras)} cameras"
        )
    if voxels.ndim != 2 or voxels.shape[1] != 3 or not voxels.is_floating_point():
        raise ValueError(
            f"expected the centres of voxels, float [L, 3], got {voxels.dtype} {tuple(voxels.shape)}; "
            "voxel_centres(coords, grid_size) makes them"
        )
    if visibility not in ("all", "depth"):
        raise ValueError(f"visibility = {visibility!r}: expected 'all' or 'depth'")
    if out_of_frame not in ("zeros", "exclude"):
        raise ValueError(f"out_of_frame = {out_of_frame!r}: expected 'zeros' or 'exclude'")
    if visibility == "depth" and (depth is None or depth.ndim != 3 or len(depth) != len(cameras)):
        got = None if depth is None else tuple(depth.shape)
        raise ValueError(f"visibility='depth' needs depth maps [V={len(cameras)}, h, w], got {got}")


def _projection(cameras: Camera, points: Tensor) -> Tensor:
    """[V, 3, 4] world -> pixels times depth. Spelled out, because TF32 and autocast would round a matrix product."""
    pose, intrinsics = cameras.world_to_camera.to(points), cameras.intrinsics.to(points)
    return (intrinsics[..., None] * pose[:, None, :3]).sum(2)


def _project(matrix: Tensor, cameras: Camera, points: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Places x and y in the frame as fractions of its sides, depth, and whether it is in the frame; each [V, L]."""
    x, y, z = (
        sum((row[:, k, None] * points[:, k] for k in range(3)), start=row[:, 3, None]) for row in matrix.unbind(1)
    )
    depth = z.clamp_min(1e-6)
    x, y = x / depth / cameras.width, y / depth / cameras.height
    inside = (x >= 0) & (x <= 1) & (y >= 0) & (y <= 1) & (z > 0)
    return torch.where(inside, x, 0.5), torch.where(inside, y, 0.5), z, inside  # keeps infinite samples out


def _bilinear(x: Tensor, y: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """The four cells around each place, as rows of the table, and their weights; each [V, L, 4]."""
    left, right, a = _neighbours(x, columns)
    top, bottom, b = _neighbours(y, rows)
    view = torch.arange(len(x), device=x.device)[:, None] * (rows * columns)
    cells = [view + i * columns + j for i in (top, bottom) for j in (left, right)]
    return torch.stack(cells, -1), torch.stack([(1 - b) * (1 - a), (1 - b) * a, b * (1 - a), b * a], -1)


def _neighbours(place: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    position = (place * count - 0.5).clamp(0, count - 1)
    lower = position.detach().floor()
    return lower.long(), (lower.long() + 1).clamp_max(count - 1), position - lower


def _at_pixels(maps: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Values [V, L] of maps [V, a, b] at the pixels that the places lie in."""
    rows, columns = maps.shape[1:]
    i, j = ((place * count).long().clamp(0, count - 1) for place, count in ((y, rows), (x, columns)))
    return maps.flatten(1).gather(1, i * columns + j)
