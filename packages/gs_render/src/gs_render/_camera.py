"""Pinhole cameras in the OpenCV convention, always a batch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

Vector = Sequence[float] | Tensor
Size = int | tuple[int, int]

# OpenGL and Blender cameras look along -z with y up; OpenCV cameras along +z with y down.
_FLIP_YZ = (1.0, -1.0, -1.0, 1.0)


@dataclass(frozen=True)
class Camera:
    """V pinhole cameras of one image size. x right, y down, z forward; pixel centres at +0.5.

    Args:
        world_to_camera: [V, 4, 4] rigid transforms.
        intrinsics: [V, 3, 3], fx, fy, cx, cy in pixels.
        width, height: image size in pixels.
    """

    world_to_camera: Float[Tensor, "v 4 4"]
    intrinsics: Float[Tensor, "v 3 3"]
    width: int
    height: int

    def __post_init__(self) -> None:
        for name, side in (("world_to_camera", 4), ("intrinsics", 3)):
            shape = tuple(getattr(self, name).shape)
            if len(shape) != 3 or shape[1:] != (side, side):
                raise ValueError(f"Camera.{name}: expected shape (V, {side}, {side}), got {shape}")
        if len(self.world_to_camera) != len(self.intrinsics):
            raise ValueError(
                f"Camera: {len(self.world_to_camera)} poses but {len(self.intrinsics)} intrinsics; expected one each"
            )
        if self.width < 1 or self.height < 1:
            raise ValueError(f"Camera: image size must be positive, got {self.width} x {self.height}")

    def __len__(self) -> int:
        return self.world_to_camera.shape[0]

    def __getitem__(self, index: int | slice | Tensor) -> Camera:
        """Some of the cameras; an int gives a batch of one."""
        if isinstance(index, int):
            if not -len(self) <= index < len(self):
                raise IndexError(f"camera {index} of a batch of {len(self)}")
            index = slice(index, index + 1 or None)
        return replace(self, world_to_camera=self.world_to_camera[index], intrinsics=self.intrinsics[index])

    def __iter__(self) -> Iterator[Camera]:
        return (self[index] for index in range(len(self)))

    @property
    def device(self) -> torch.device:
        return self.world_to_camera.device

    @property
    def camera_to_world(self) -> Float[Tensor, "v 4 4"]:
        """[V, 4, 4] inverse poses (the rotation is transposed, not inverted)."""
        rotation = self.world_to_camera[:, :3, :3].mT
        top = torch.cat([rotation, self.positions[:, :, None]], dim=-1)
        return torch.cat([top, self.world_to_camera[:, 3:]], dim=1)

    @property
    def positions(self) -> Float[Tensor, "v 3"]:
        """[V, 3] centres of projection in the world."""
        pose = self.world_to_camera
        return -(pose[:, :3, :3].mT @ pose[:, :3, 3:]).squeeze(-1)

    @property
    def fov_degrees(self) -> Float[Tensor, "v 2"]:
        """[V, 2] full horizontal and vertical angles of view."""
        focal = self.intrinsics.diagonal(dim1=1, dim2=2)[:, :2]
        size = focal.new_tensor([self.width, self.height])
        return torch.rad2deg(2 * torch.atan(0.5 * size / focal))

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Camera:
        """On another device and/or with another dtype; itself if nothing changes."""
        device = self.device if device is None else torch.device(device)
        if device == self.device and dtype in (None, self.world_to_camera.dtype):
            return self
        return replace(
            self,
            world_to_camera=self.world_to_camera.to(device=device, dtype=dtype),
            intrinsics=self.intrinsics.to(device=device, dtype=dtype),
        )

    def resize(self, size: Size) -> Camera:
        """The same views at another image size: int (square) or (width, height)."""
        width, height = _size(size)
        factor = self.intrinsics.new_tensor([width / self.width, height / self.height, 1.0])
        return replace(self, intrinsics=self.intrinsics * factor[:, None], width=width, height=height)

    def project(self, points: Float[Tensor, "n 3"]) -> tuple[Float[Tensor, "v n 2"], Float[Tensor, "v n"]]:
        """World points [N, 3] -> pixels [V, N, 2] (x, y) and depth [V, N] along z; depth <= 0 lies behind."""
        local = points @ self.world_to_camera[:, :3, :3].mT + self.world_to_camera[:, None, :3, 3]
        depth = local[..., 2]
        homogeneous = local @ self.intrinsics.mT
        return homogeneous[..., :2] / homogeneous[..., 2:], depth

    @staticmethod
    def concatenate(parts: Sequence[Camera]) -> Camera:
        """One batch of several; all of one image size."""
        sizes = {(part.width, part.height) for part in parts}
        if len(sizes) != 1:
            raise ValueError(f"Camera.concatenate: expected cameras of one image size, got {sorted(sizes)}")
        return replace(
            parts[0],
            world_to_camera=torch.cat([part.world_to_camera for part in parts]),
            intrinsics=torch.cat([part.intrinsics for part in parts]),
        )

    @classmethod
    def look_at(
        cls,
        eye: Vector,
        target: Vector = (0.0, 0.0, 0.0),
        up: Vector = (0.0, 0.0, 1.0),
        fov_degrees: float = 40.0,
        size: Size = 512,
    ) -> Camera:
        """Cameras at `eye` that look at `target`.

        Args:
            eye, target, up: [3] or [V, 3], world units; they broadcast. If `up` is the direction of view, world +y
                stands in for it (so a camera right above the object has +y up in its picture).
            fov_degrees: full angle of view over the shorter side of the image.
            size: int (square) or (width, height), pixels.
        """
        rows = [torch.atleast_2d(torch.as_tensor(value, dtype=torch.float32)) for value in (eye, target, up)]
        eye_, target_, up_ = torch.broadcast_tensors(*rows)
        distance = (target_ - eye_).norm(dim=-1)
        if bool((distance < 1e-9).any()):
            raise ValueError("Camera.look_at: eye and target are the same point; a direction of view is needed")
        forward = torch.nn.functional.normalize(target_ - eye_, dim=-1)
        right = torch.linalg.cross(forward, up_)
        fallback = torch.linalg.cross(forward, torch.tensor([0.0, 1.0, 0.0]).expand_as(forward))
        parallel = right.norm(dim=-1, keepdim=True) < 1e-5 * up_.norm(dim=-1, keepdim=True)
        right = torch.nn.functional.normalize(torch.where(parallel, fallback, right), dim=-1)
        rotation = torch.stack([right, torch.linalg.cross(forward, right), forward], dim=-2)
        pose = torch.eye(4).repeat(len(rotation), 1, 1)
        pose[:, :3, :3] = rotation
        pose[:, :3, 3:] = -rotation @ eye_[:, :, None]
        return cls.from_fov(pose, fov_degrees, size)

    @classmethod
    def on_sphere(
        cls,
        azimuth_degrees: Vector,
        elevation_degrees: float | Vector = 20.0,
        radius: float | Vector = 2.0,
        fov_degrees: float = 40.0,
        size: Size = 512,
        target: Vector = (0.0, 0.0, 0.0),
    ) -> Camera:
        """Cameras on a sphere around `target`, z up.

        Azimuth 0 looks from -y; a larger azimuth moves the eye counter-clockwise seen from above (towards +x).

        Args:
            azimuth_degrees: [V]; elevation_degrees, radius: one number or [V].
            fov_degrees, size: as in `look_at`.
        """
        azimuth, elevation, distance = torch.broadcast_tensors(
            *(torch.as_tensor(v, dtype=torch.float64) for v in (azimuth_degrees, elevation_degrees, radius))
        )
        az, el = torch.deg2rad(azimuth).reshape(-1), torch.deg2rad(elevation).reshape(-1)
        offset = torch.stack([el.cos() * az.sin(), -el.cos() * az.cos(), el.sin()], dim=-1)
        centre = torch.as_tensor(target, dtype=torch.float64)
        return cls.look_at(centre + distance.reshape(-1, 1) * offset, centre, (0.0, 0.0, 1.0), fov_degrees, size)

    @classmethod
    def orbit(
        cls,
        num_views: int = 8,
        radius: float = 2.0,
        fov_degrees: float = 40.0,
        size: Size = 512,
        elevation_degrees: float = 20.0,
        start_degrees: float = 0.0,
        target: Vector = (0.0, 0.0, 0.0),
    ) -> Camera:
        """`num_views` cameras at even steps of azimuth around z, the first at `start_degrees` (see `on_sphere`)."""
        if num_views < 1:
            raise ValueError(f"Camera.orbit: num_views must be at least 1, got {num_views}")
        azimuth = start_degrees + torch.arange(num_views, dtype=torch.float64) * (360.0 / num_views)
        return cls.on_sphere(azimuth, elevation_degrees, radius, fov_degrees, size, target)

    @classmethod
    def from_fov(cls, world_to_camera: Float[Tensor, "v 4 4"], fov_degrees: float, size: Size) -> Camera:
        """Square pixels, principal point in the middle, full angle `fov_degrees` over the shorter side."""
        if not 0 < fov_degrees < 180:
            raise ValueError(f"Camera: fov_degrees must lie between 0 and 180, got {fov_degrees}")
        width, height = _size(size)
        focal = 0.5 * min(width, height) / math.tan(math.radians(fov_degrees) / 2)
        row = [[focal, 0.0, width / 2], [0.0, focal, height / 2], [0.0, 0.0, 1.0]]
        intrinsics = world_to_camera.new_tensor(row).repeat(len(world_to_camera), 1, 1)
        return cls(world_to_camera, intrinsics, width, height)

    @classmethod
    def from_opengl(cls, camera_to_world: Float[Tensor, "v 4 4"], fov_degrees: float, size: Size) -> Camera:
        """Poses of OpenGL, Blender and NeRF's transforms.json: camera-to-world, x right, y up, looking along -z."""
        opencv = camera_to_world * camera_to_world.new_tensor(_FLIP_YZ)
        rotation = opencv[:, :3, :3].mT
        pose = torch.eye(4).to(opencv).repeat(len(opencv), 1, 1)
        pose[:, :3, :3] = rotation
        pose[:, :3, 3:] = -rotation @ opencv[:, :3, 3:]
        return cls.from_fov(pose, fov_degrees, size)

    def to_opengl(self) -> Float[Tensor, "v 4 4"]:
        """[V, 4, 4] camera-to-world matrices of OpenGL/Blender (see `from_opengl`)."""
        return self.camera_to_world * self.camera_to_world.new_tensor(_FLIP_YZ)

    @classmethod
    def from_colmap(
        cls,
        quaternions: Float[Tensor, "v 4"],
        translations: Float[Tensor, "v 3"],
        focal: tuple[float, float],
        principal: tuple[float, float],
        size: tuple[int, int],
    ) -> Camera:
        """COLMAP's images.txt (QW QX QY QZ, TX TY TZ) and a PINHOLE camera (fx, fy), (cx, cy), (width, height)."""
        from gs_render._rotation import quaternion_to_matrix

        pose = torch.eye(4).to(quaternions).repeat(len(quaternions), 1, 1)
        pose[:, :3, :3] = quaternion_to_matrix(quaternions)
        pose[:, :3, 3] = translations
        row = [[focal[0], 0.0, principal[0]], [0.0, focal[1], principal[1]], [0.0, 0.0, 1.0]]
        return cls(pose, pose.new_tensor(row).repeat(len(pose), 1, 1), *size)

    def to_colmap(self) -> tuple[Float[Tensor, "v 4"], Float[Tensor, "v 3"]]:
        """Quaternions wxyz [V, 4] and translations [V, 3] as in COLMAP's images.txt."""
        from gs_render._rotation import matrix_to_quaternion

        return matrix_to_quaternion(self.world_to_camera[:, :3, :3]), self.world_to_camera[:, :3, 3]


def _size(size: Size) -> tuple[int, int]:
    width, height = (size, size) if isinstance(size, int) else size
    if width < 1 or height < 1:
        raise ValueError(f"Camera: size must be a positive int or (width, height), got {size}")
    return int(width), int(height)
