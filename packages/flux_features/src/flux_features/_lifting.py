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

_CHUNK_ELEMENTS = 64 * 2**20  # samples x channels held at once; 256 MB in fp32


def voxel_centres(coords: Int[Tensor, "L 3"], grid_size: int) -> Float[Tensor, "L 3"]:
    """World positions of voxel centres: ``(coords + 0.5) / grid_size - 0.5``."""
    return (coords.float() + 0.5) / grid_size - 0.5


def lift_features(
    feature_maps: Float[Tensor, "V C h w"],
    cameras: Camera,
    points: Float[Tensor, "L 3"],
    visibility: Literal["all", "depth"] = "all",
    *,
    depth: Float[Tensor, "V a b"] | None = None,
    depth_tolerance: float = 0.03,
    out_of_frame: Literal["zeros", "exclude"] = "zeros",
) -> Float[Tensor, "L C"]:
    """Mean over views of the bilinearly sampled feature at each point's projection.

    Args:
        feature_maps: one map per view; texel (0, 0) covers the image's top-left corner (pixel centres at +0.5).
        cameras: V cameras; their intrinsics refer to ``cameras.width x cameras.height`` pixels, which the maps tile evenly.
        points: world positions, usually :func:`voxel_centres`.
        visibility: ``"all"`` averages every view whether or not the surface hides the point (paper, TRELLIS);
            ``"depth"`` only views whose depth map says that the point is not hidden. A point that no view sees falls
            back to all views.
        depth: view-space z of the nearest surface for ``"depth"``, any resolution, ``inf`` for background.
        depth_tolerance: world units by which a point may lie behind the recorded surface and still count as seen.
        out_of_frame: a projection outside the frame (or behind the camera) counts as a zero feature (TRELLIS) or is left
            out of the mean. Under ``visibility="depth"`` it is always left out.

    Returns:
        Features ``[L, C]`` in the dtype of ``feature_maps``; positions are computed in float32 or better.

    Raises:
        ValueError: numbers of views disagree, or ``visibility="depth"`` without depth maps.
    """
    num_views, channels = feature_maps.shape[:2]
    if cameras.world_to_camera.shape[0] != num_views:
        raise ValueError(
            f"got {num_views} feature maps and {cameras.world_to_camera.shape[0]} cameras, expected as many"
        )
    if visibility == "depth" and (depth is None or depth.shape[0] != num_views):
        raise ValueError(
            f"visibility='depth' needs depth maps [V={num_views}, h, w], got {None if depth is None else tuple(depth.shape)}"
        )
    chunk = max(1, _CHUNK_ELEMENTS // max(1, num_views * channels))
    parts = [
        _lift_chunk(feature_maps, cameras, part, visibility, depth, depth_tolerance, out_of_frame)
        for part in points.split(chunk)
    ]
    return torch.cat(parts) if parts else feature_maps.new_zeros(0, channels)


def _lift_chunk(
    feature_maps: Tensor,
    cameras: Camera,
    points: Tensor,
    visibility: str,
    depth: Tensor | None,
    depth_tolerance: float,
    out_of_frame: str,
) -> Tensor:
    pose = cameras.world_to_camera.to(points)
    intrinsics = cameras.intrinsics.to(points)
    view_space = points @ pose[:, :3, :3].mT + pose[:, None, :3, 3]  # [V, L, 3]
    z = view_space[..., 2]
    pixels = (view_space @ intrinsics.mT)[..., :2] / z.clamp_min(1e-6)[..., None]
    size = torch.tensor([cameras.width, cameras.height], dtype=points.dtype, device=points.device)
    grid = pixels / size * 2 - 1  # grid_sample's [-1, 1] spans pixel edges: align_corners=False
    inside = (grid.abs() <= 1).all(-1) & (z > 0)
    grid = torch.where(inside[..., None], grid, torch.zeros_like(grid))  # keeps NaN and far samples out

    sampled = F.grid_sample(
        feature_maps, grid[:, None].to(feature_maps.dtype), mode="bilinear", padding_mode="border", align_corners=False
    )[:, :, 0]  # [V, C, L]
    inside_weight = inside.to(feature_maps.dtype)
    every_view = inside_weight if out_of_frame == "exclude" else torch.ones_like(inside_weight)
    weight = every_view
    if visibility == "depth":
        assert depth is not None
        surface = F.grid_sample(depth[:, None].to(points), grid[:, None], mode="nearest", align_corners=False)[:, 0, 0]
        seen = inside & (z <= surface + depth_tolerance)
        weight = torch.where(seen.any(0), seen.to(feature_maps.dtype), every_view)
    total = torch.einsum("vcl,vl->lc", sampled, weight * inside_weight)
    return total / weight.sum(0).clamp_min(1)[:, None]
