"""The container of a splat: activated Gaussian parameters as tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from gs_render._rotation import normalize_quaternions, quaternion_multiply, quaternion_to_matrix, to_rotation_matrix
from gs_render._sh import SH_C0, num_coefficients, rotate_sh

_DEGREE_OF = {num_coefficients(degree): degree for degree in range(4)}


@dataclass(frozen=True)
class Gaussians:
    """N Gaussians with a colour that may depend on the direction of view. Values are *activated*, ready to render.

    Args:
        means: [N, 3] centres, world units (z up, right-handed).
        scales: [N, 3] standard deviations along the Gaussian's own axes, world units, not negative.
        quaternions: [N, 4] rotations own axes -> world, order w, x, y, z; any length but zero.
        opacities: [N] in [0, 1].
        sh: [N, K, 3] spherical harmonics, K = 1, 4, 9 or 16 (degree 0..3), the basis of 3DGS:
            rgb = 0.5 + 0.28209479 sh[:, 0] + ..., clamped from below at 0.

    Shapes and dtypes are checked here; values are not, so that a training loop on a GPU never waits for the host:
    call `validate` where data come from outside (`load` does).
    """

    means: Float[Tensor, "n 3"]
    scales: Float[Tensor, "n 3"]
    quaternions: Float[Tensor, "n 4"]
    opacities: Float[Tensor, " n"]
    sh: Float[Tensor, "n k 3"]

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, Tensor):
                raise TypeError(f"Gaussians.{field.name}: expected a torch.Tensor, got {type(value).__name__}")
            if not value.is_floating_point():
                raise TypeError(f"Gaussians.{field.name}: expected a floating-point tensor, got {value.dtype}")
        n = self.means.shape[0] if self.means.ndim else 0
        expected = {"means": (n, 3), "scales": (n, 3), "quaternions": (n, 4), "opacities": (n,)}
        for name, shape in expected.items():
            if tuple(getattr(self, name).shape) != shape:
                raise ValueError(f"Gaussians.{name}: expected shape {shape}, got {tuple(getattr(self, name).shape)}")
        shape = tuple(self.sh.shape)
        if len(shape) != 3 or shape[0] != n or shape[1] not in _DEGREE_OF or shape[2] != 3:
            raise ValueError(f"Gaussians.sh: expected shape ({n}, K, 3) with K one of 1, 4, 9, 16, got {shape}")
        for name in ("scales", "quaternions", "opacities", "sh"):
            value = getattr(self, name)
            if value.device != self.means.device or value.dtype != self.means.dtype:
                raise ValueError(
                    f"Gaussians.{name} is {value.dtype} on {value.device}, but means are {self.means.dtype} on "
                    f"{self.means.device}: bring all fields to one dtype and device"
                )

    def __len__(self) -> int:
        return self.means.shape[0]

    def __getitem__(self, index: slice | Int[Tensor, " m"] | Bool[Tensor, " n"]) -> Gaussians:
        """The Gaussians picked by a slice, an index tensor [M] or a mask [N]."""
        if isinstance(index, int):
            raise TypeError(f"Gaussians[{index}]: index with a slice, e.g. gaussians[{index}:{index + 1}], or a tensor")
        return self._map(lambda value: value[index])

    def __repr__(self) -> str:
        return f"Gaussians({len(self)}, sh_degree={self.sh_degree}, {self.dtype}, {self.device})"

    def _map(self, function) -> Gaussians:
        return Gaussians(**{field.name: function(getattr(self, field.name)) for field in fields(self)})

    @property
    def device(self) -> torch.device:
        return self.means.device

    @property
    def dtype(self) -> torch.dtype:
        return self.means.dtype

    @property
    def sh_degree(self) -> int:
        return _DEGREE_OF[self.sh.shape[1]]

    @property
    def rgb(self) -> Float[Tensor, "n 3"]:
        """[N, 3] the colour without its dependence on direction, not clamped."""
        return 0.5 + SH_C0 * self.sh[:, 0]

    @property
    def covariances(self) -> Float[Tensor, "n 3 3"]:
        """[N, 3, 3] covariance in the world."""
        axes = quaternion_to_matrix(self.quaternions) * self.scales[:, None, :]
        return axes @ axes.mT

    @classmethod
    def from_rgb(
        cls,
        means: Float[Tensor, "n 3"],
        scales: Float[Tensor, "n 3"],
        quaternions: Float[Tensor, "n 4"],
        opacities: Float[Tensor, " n"],
        rgb: Float[Tensor, "n 3"],
    ) -> Gaussians:
        """Gaussians of a fixed colour: rgb [N, 3] in [0, 1]."""
        return cls(means, scales, quaternions, opacities, ((rgb - 0.5) / SH_C0)[:, None, :])

    @classmethod
    def empty(
        cls, sh_degree: int = 0, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> Gaussians:
        """No Gaussians at all."""
        shapes = ((0, 3), (0, 3), (0, 4), (0,), (0, num_coefficients(sh_degree), 3))
        return cls(*(torch.zeros(shape, device=device, dtype=dtype) for shape in shapes))

    @staticmethod
    def concatenate(parts: Sequence[Gaussians]) -> Gaussians:
        """One container of several; missing higher harmonics are zeros."""
        if not parts:
            raise ValueError("Gaussians.concatenate: expected at least one Gaussians, got an empty sequence")
        degree = max(part.sh_degree for part in parts)
        parts = [part.with_sh_degree(degree) for part in parts]
        names = [field.name for field in fields(Gaussians)]
        return Gaussians(**{name: torch.cat([getattr(part, name) for part in parts]) for name in names})

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Gaussians:
        """On another device and/or with another floating-point dtype; itself if nothing changes."""
        device = self.device if device is None else torch.device(device)
        if device == self.device and dtype in (None, self.dtype):
            return self
        return self._map(lambda value: value.to(device=device, dtype=dtype))

    def detach(self) -> Gaussians:
        """The same values outside of the autograd graph."""
        return self._map(torch.Tensor.detach)

    def with_sh_degree(self, degree: int) -> Gaussians:
        """Cut or zero-pad the spherical harmonics to a degree 0..3."""
        count = num_coefficients(degree)
        have = self.sh.shape[1]
        if have == count:
            return self
        padding = self.sh.new_zeros(len(self), max(count - have, 0), 3)
        return replace(self, sh=torch.cat([self.sh[:, :count], padding], dim=1))

    def validate(self) -> Gaussians:
        """Itself, or ValueError if a value is not finite or out of its range. Waits for the device."""
        for field in fields(self):
            value = getattr(self, field.name)
            bad = ~torch.isfinite(value)
            if bool(bad.any()):
                row = int(bad.reshape(len(self), -1).any(dim=1).nonzero()[0])
                count = int(bad.sum())
                raise ValueError(f"Gaussians.{field.name}: {count} values are not finite, the first in row {row}")
        if bool((self.scales < 0).any()):
            raise ValueError(f"Gaussians.scales: expected values >= 0, got {float(self.scales.min()):.6g}")
        if bool(((self.opacities < 0) | (self.opacities > 1)).any()):
            low, high = float(self.opacities.min()), float(self.opacities.max())
            raise ValueError(f"Gaussians.opacities: expected values in [0, 1], got {low:.6g} .. {high:.6g}")
        if bool((self.quaternions == 0).all(dim=1).any()):
            row = int((self.quaternions == 0).all(dim=1).nonzero()[0])
            raise ValueError(f"Gaussians.quaternions: row {row} is zero and turns nothing; (1, 0, 0, 0) is no rotation")
        return self

    def prune(self, min_opacity: float = 1 / 255, max_scale: float | None = None) -> Gaussians:
        """Without what cannot be seen: opacity under `min_opacity`, or longest axis over `max_scale` (world units)."""
        keep = self.opacities >= min_opacity
        if max_scale is not None:
            keep &= self.scales.amax(dim=1) <= max_scale
        return self[keep]

    def crop(self, low: Sequence[float], high: Sequence[float]) -> Gaussians:
        """Those whose centre lies in the axis-aligned box low..high (three numbers each, inclusive)."""
        below, above = (torch.as_tensor(bound, dtype=self.dtype, device=self.device) for bound in (low, high))
        return self[((self.means >= below) & (self.means <= above)).all(dim=1)]

    def transform(
        self,
        rotation: Float[Tensor, ...] | Sequence | None = None,
        translation: Sequence[float] | Float[Tensor, 3] = (0.0, 0.0, 0.0),
        scale: float = 1.0,
    ) -> Gaussians:
        """Move by the similarity x -> scale * rotation x + translation; the harmonics turn along.

        Args:
            rotation: [3, 3] proper rotation matrix or [4] quaternion wxyz; None turns nothing.
            translation: three world units.
            scale: > 0.
        """
        if not scale > 0:
            raise ValueError(f"Gaussians.transform: scale must be > 0, got {scale}")
        shift = torch.as_tensor(translation, dtype=self.dtype, device=self.device)
        if rotation is None:
            return replace(self, means=scale * self.means + shift, scales=scale * self.scales)
        matrix, quaternion = to_rotation_matrix(rotation, dtype=self.dtype, device=self.device)
        return Gaussians(
            means=scale * self.means @ matrix.mT + shift,
            scales=scale * self.scales,
            quaternions=quaternion_multiply(quaternion, normalize_quaternions(self.quaternions)),
            opacities=self.opacities,
            sh=rotate_sh(self.sh, matrix),
        )
