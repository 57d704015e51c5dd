"""Triangle meshes of Gaussians: fuse rendered depth into a truncated signed distance volume, extract, colour.

Fusion follows Curless & Levoy 1996, extraction is naive surface nets (Gibson 1998): one vertex in every cell that the
surface crosses, so the mesh is closed where the volume is and needs no case table.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from gs_render._axes import Up, file_rotation
from gs_render._camera import Camera
from gs_render._gaussians import Gaussians
from gs_render._pictures import FOV_DEGREES, DrawFunction, viewing_distance
from gs_render._render import RenderOutput, render

_TRUNCATION = 3.0  # voxels on either side of the surface in which distances are averaged
_SOLID = 0.5  # a pixel with less alpha looks past the object


@dataclass(frozen=True)
class Mesh:
    """V vertices and F triangles in the world frame (z up).

    vertices: [V, 3]; faces: [F, 3] indices, counter-clockwise from outside; colors: [V, 3] sRGB in [0, 1].
    """

    vertices: Float[Tensor, "v 3"]
    faces: Int[Tensor, "f 3"]
    colors: Float[Tensor, "v 3"]

    def save(self, path: str | os.PathLike[str], up: Up = "y") -> Path:
        """Write .obj (colours behind the coordinates, as MeshLab and Blender read them) or .glb (unlit vertex colours).

        Args:
            path: file to write, the suffix names the type.
            up: axis of the file that points up; both types are y up by custom.
        """
        from gs_render._formats import _mesh_files

        path = Path(path)
        rotation = file_rotation(up)
        vertices = self.vertices if rotation is None else self.vertices @ torch.tensor(rotation).float().T
        write = {".obj": _mesh_files.write_obj, ".glb": _mesh_files.write_glb}.get(path.suffix.lower())
        if write is None:
            raise ValueError(f"{path}: expected a mesh of type .obj or .glb, got {path.suffix!r}")
        write(path, vertices.cpu().numpy(), self.faces.cpu().numpy(), self.colors.cpu().numpy())
        return path


def extract_mesh(
    gaussians: Gaussians, resolution: int = 128, num_views: int = 48, size: int = 512, draw: DrawFunction = render
) -> Mesh:
    """Surface of the Gaussians, with colours.

    Depth is rendered from `num_views` directions around the object. Space that some view sees through is outside; what
    no view reaches is inside, so the mesh is closed. Details finer than a voxel, and half-transparent parts, are lost.

    Args:
        gaussians: at least one visible Gaussian.
        resolution: voxels along the longest side of the object's box, 8..512.
        num_views: cameras, spread evenly over the sphere.
        size: pixels of a side of each depth picture; twice the resolution or more.
        draw: `render` or a renderer component.
    """
    if not 8 <= resolution <= 512:
        raise ValueError(f"extract_mesh: resolution must lie in 8..512, got {resolution}")
    gaussians = gaussians.detach().to(dtype=torch.float32).prune(0.05)
    if not len(gaussians):
        raise ValueError("extract_mesh: expected Gaussians with an opacity of at least 0.05, got none")
    low, high = _bounds(gaussians)
    voxel = float((high - low).max()) / resolution
    shape = tuple(int(n) + 1 for n in torch.ceil((high - low) / voxel).int())
    cameras = _sphere_cameras((low + high) / 2, float((high - low).norm()) / 2, num_views, size).to(gaussians.device)
    views = _draw_views(gaussians, cameras, 2 * voxel, draw)
    volume = _fuse(low, voxel, shape, cameras, views)
    corner_vertices, faces = surface_nets(volume)
    vertices = low + voxel * corner_vertices.to(low)
    return Mesh(vertices, faces.to(low.device), _vertex_colors(vertices, voxel, cameras, views))


def _bounds(gaussians: Gaussians) -> tuple[Tensor, Tensor]:
    """Box around all centres with two standard deviations and a rim that stays outside of the surface."""
    reach = 2 * gaussians.covariances.diagonal(dim1=1, dim2=2).clamp_min(0).sqrt()
    low, high = (gaussians.means - reach).amin(dim=0), (gaussians.means + reach).amax(dim=0)
    rim = 0.04 * (high - low).max() + 1e-6
    return low - rim, high + rim


def _sphere_cameras(centre: Tensor, radius: float, num_views: int, size: int) -> Camera:
    """Cameras on a Fibonacci spiral around the ball, all looking at its centre."""
    step = torch.arange(num_views, dtype=torch.float64) + 0.5
    elevation = torch.rad2deg(torch.asin(1 - 2 * step / num_views))
    azimuth = torch.rad2deg(step * torch.pi * (3 - 5**0.5))
    return Camera.on_sphere(azimuth, elevation, viewing_distance(radius), FOV_DEGREES, size, centre.cpu())


def _draw_views(gaussians: Gaussians, cameras: Camera, margin: float, draw: DrawFunction) -> RenderOutput:
    """All views, colours not dimmed by alpha.

    Where a little of the far side shines through, the mean depth would lie inside the object: draw again without what
    lies more than `margin` behind the mean, which leaves the front side alone.
    """
    parts = []
    with torch.no_grad():
        for camera in cameras:
            whole = front = draw(gaussians, camera, 0.0)
            for _ in range(2):
                view = (front.color[0], whole.alpha[0], front.depth[0])
                _, in_front, solid = _look_up(gaussians.means, camera, view)
                front = draw(gaussians[~solid | (in_front > -margin)], camera, 0.0)
            parts.append(RenderOutput(front.color / front.alpha.clamp_min(1e-3), whole.alpha, front.depth))
    return RenderOutput(*(torch.cat([getattr(part, key) for part in parts]) for key in ("color", "alpha", "depth")))


def _look_up(points: Tensor, camera: Camera, view: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """For [N, 3] points in one view: (colour [N, 3], distance in front of the drawn surface [N], solid [N])."""
    pixels, depth = camera.project(points)
    column = pixels[0, :, 0].clamp(0, camera.width - 1).long()
    row = pixels[0, :, 1].clamp(0, camera.height - 1).long()
    color, alpha, surface = (field[row, column] for field in view)
    return color, surface[:, 0] - depth[0], alpha[:, 0] >= _SOLID


def _fuse(low: Tensor, voxel: float, shape: tuple[int, ...], cameras: Camera, views: RenderOutput) -> Tensor:
    """[X, Y, Z] signed distance at voxel corners in truncations, -1 inside .. 1 outside."""
    axes = [torch.arange(count, device=low.device) for count in shape]
    points = low + voxel * torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).reshape(-1, 3)
    total, weight = torch.zeros_like(points[:, 0]), torch.zeros_like(points[:, 0])
    band = _TRUNCATION * voxel
    for index, camera in enumerate(cameras):
        _, distance, solid = _look_up(points, camera, (views.color[index], views.alpha[index], views.depth[index]))
        # A ray that meets nothing proves that all its voxels are outside.
        value = torch.where(solid, (distance / band).clamp_max(1), torch.ones_like(distance))
        seen = value > -1
        total += torch.where(seen, value, torch.zeros_like(value))
        weight += seen
    # One ray may slip between two Gaussians of a closed surface; empty space is seen from more than a few sides.
    enough = weight >= max(2, 0.1 * len(cameras))
    mean = torch.where(enough, total / weight.clamp_min(1), -torch.ones_like(total))
    volume = mean.reshape(shape)
    for axis in range(3):  # the rim is outside whatever the views say, so the surface is closed
        volume.select(axis, 0).fill_(1)
        volume.select(axis, -1).fill_(1)
    return volume


def surface_nets(volume: Float[Tensor, "x y z"]) -> tuple[Float[Tensor, "v 3"], Int[Tensor, "f 3"]]:
    """Zero surface of a scalar field at grid points: vertices in grid units, faces wound towards larger values."""
    field = volume.detach().cpu().numpy().astype(np.float64)
    inside = field < 0
    cells = tuple(count - 1 for count in field.shape)
    sums, counts = np.zeros((*cells, 3)), np.zeros(cells)
    quads = []
    for axis in range(3):
        near, far = (np.moveaxis(field, axis, 0)[part] for part in (slice(None, -1), slice(1, None)))
        crossing = np.argwhere(np.moveaxis(inside, axis, 0)[:-1] != np.moveaxis(inside, axis, 0)[1:])
        at = tuple(crossing.T)
        points = crossing.astype(np.float64)
        points[:, 0] += near[at] / (near[at] - far[at])
        # `moveaxis` put `axis` in front; undo it.
        back = np.argsort([axis, *(other for other in range(3) if other != axis)])
        crossing, points = crossing[:, back], points[:, back]
        # The four cells around an edge, in a ring around the axis.
        u, v = (axis + 1) % 3, (axis + 2) % 3
        ring = []
        for du, dv in ((-1, -1), (0, -1), (0, 0), (-1, 0)):
            cell = crossing.copy()
            cell[:, u] += du
            cell[:, v] += dv
            ring.append(cell)
        valid = np.all([((cell >= 0) & (cell < cells)).all(axis=1) for cell in ring], axis=0)
        flat = [np.ravel_multi_index(tuple(cell[valid].T), cells) for cell in ring]
        for index in flat:
            np.add.at(sums.reshape(-1, 3), index, points[valid])
            np.add.at(counts.reshape(-1), index, 1)
        quad = np.stack(flat, axis=1)
        leaves = inside[tuple(crossing[valid].T)]  # from inside to outside along the axis: the ring is wound outwards
        quads.append(np.where(leaves[:, None], quad, quad[:, ::-1]))
    quad = np.concatenate(quads)
    used, compact = np.unique(quad, return_inverse=True)
    compact = compact.reshape(quad.shape)
    vertices = sums.reshape(-1, 3)[used] / counts.reshape(-1)[used, None]
    faces = np.concatenate([compact[:, [0, 1, 2]], compact[:, [0, 2, 3]]])
    return torch.from_numpy(vertices).float(), torch.from_numpy(faces)


def _vertex_colors(vertices: Tensor, voxel: float, cameras: Camera, views: RenderOutput) -> Tensor:
    """[V, 3] mean colour over the views that see a vertex, straight alpha; grey where none does."""
    total, weight = torch.zeros_like(vertices), torch.full_like(vertices[:, :1], 1e-6)
    for index, camera in enumerate(cameras):
        view = (views.color[index], views.alpha[index], views.depth[index])
        color, distance, solid = _look_up(vertices, camera, view)
        seen = (solid & (distance.abs() < 2 * voxel))[:, None].to(color)
        total += seen * color
        weight += seen
    return torch.where(weight > 0.5, total / weight, torch.full_like(total, 0.5)).clamp(0, 1)
