"""Modal-aware rotary position embedding: voxels inside a volume, image patches on planes outside it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float, Num
from torch import Tensor

from marope._axial import AxialRoPE
from marope._frequencies import Scaling, equal_axes

_AXES = {"x": 0, "y": 1, "z": 2}


class MARoPE(AxialRoPE):
    """Rotary positions shared by the tokens of a voxel volume and of the images that condition it.

    A voxel stands at its raw index (x, y, z) in 0..grid_size-1. Patch (i, j) of image m stands on a virtual plane
    outside the volume, parallel to one of its faces: with the defaults at (i, j, grid_size + m), which for one image
    is the paper's (i, j, z_max + 1) (Diff2to3, section 3.2). So a plane and the volume never share a position, and
    two images never share one either.

    Args:
        head_dim: channels of an attention head, even and at least 6.
        grid_size: voxels along each side of the token grid, z_max + 1.
        axes_dim: channels for x, y and z, each even; default: equal shares (64 -> 20, 20, 20 and 4 unrotated).
        theta: base of the wavelengths, one for all axes or one for each of x, y and z.
        plane_axis: axis along which planes are stacked. "z" or "+z": at grid_size, grid_size + 1, ...;
            "-z": at -1, -2, ...
        orientation: the signed volume axes that image rows i and columns j run along. ("+x", "+y") is the paper's.
            ("-z", "+x") with plane_axis "-y" attaches the picture of a camera that looks from -y with z up. An axis
            that runs backwards starts at the last index: row 0 of "-z" has z = grid_size - 1.
        plane_extent: "index" places patch i at index i, whatever the number of patches (the paper). "grid" stretches
            the plane over the extent of the volume: patch centre (i + 0.5) * grid_size / h - 0.5. They agree when an
            image has as many patches as the volume has voxels; otherwise "grid" is linear position interpolation,
            for instance 16 x 16 patches beside an 8^3 grid, or an image of twice the training resolution.
        interleaved: which channels form a pair, see `apply_rotary`.
        scaling: for a grid `factor` times as long as in training: `("linear", factor)` divides all positions, those of
            planes included; `("ntk", factor)` keeps neighbours as far apart and stretches the longest wavelength. One
            factor, or one for each of x, y and z. Images alone that grow need none: see `plane_extent`.
    """

    def __init__(
        self,
        head_dim: int = 64,
        grid_size: int = 32,
        *,
        axes_dim: Sequence[int] | None = None,
        theta: float | Sequence[float] = 10000.0,
        plane_axis: str = "z",
        orientation: tuple[str, str] = ("+x", "+y"),
        plane_extent: Literal["index", "grid"] = "index",
        interleaved: bool = True,
        scaling: Scaling | None = None,
    ) -> None:
        axes = equal_axes(head_dim) if axes_dim is None else axes_dim
        super().__init__(head_dim, axes, theta=theta, interleaved=interleaved, scaling=scaling)
        if len(self.axes_dim) != 3:
            raise ValueError(f"axes_dim must hold one share for each of x, y and z, got {self.axes_dim}")
        if grid_size < 1:
            raise ValueError(f"grid_size must be at least 1, got {grid_size}")
        if plane_extent not in ("index", "grid"):
            raise ValueError(f'plane_extent must be "index" or "grid", got {plane_extent!r}')
        plane, rows, columns = (_signed_axis(name) for name in (plane_axis, *orientation))
        if len({plane[0], rows[0], columns[0]}) != 3:
            raise ValueError(
                "the normal of the plane, image rows and image columns must run along three different axes, "
                f"got plane_axis={plane_axis!r} and orientation={orientation!r}"
            )
        self.grid_size = grid_size
        self.plane_axis = plane_axis
        self.orientation = (orientation[0], orientation[1])
        self.plane_extent = plane_extent
        self._plane, self._rows, self._columns = plane, rows, columns

    def volume(self, coords: Num[Tensor, "L 3"]) -> Float[Tensor, "L 3"]:
        """Positions of voxels: their raw indices (x, y, z), each in 0..grid_size-1, as float32.

        The range is not checked, since that would wait for the device: an index outside it may fall onto a plane.
        """
        if coords.ndim != 2 or coords.shape[1] != 3:
            raise ValueError(f"coords must be [L, 3] voxel indices (x, y, z), got shape {tuple(coords.shape)}")
        return coords.float()

    def plane(
        self, h: int, w: int, index: int = 0, *, device: torch.device | str | None = None
    ) -> Float[Tensor, "patches 3"]:
        """Positions of the h x w patches of condition image `index`, row-major, [h * w, 3] float32."""
        if h < 1 or w < 1 or index < 0:
            raise ValueError(f"a plane needs h >= 1, w >= 1 and index >= 0, got h={h}, w={w}, index={index}")
        positions = torch.empty(h, w, 3, dtype=torch.float32, device=device)
        axis, forward = self._plane
        positions[..., axis] = self.grid_size + index if forward else -1 - index
        positions[..., self._rows[0]] = self._along(h, self._rows[1], device)[:, None]
        positions[..., self._columns[0]] = self._along(w, self._columns[1], device)[None, :]
        return positions.flatten(0, 1)

    def _along(self, count: int, forward: bool, device: torch.device | str | None) -> Float[Tensor, " count"]:
        steps = torch.arange(count, dtype=torch.float32, device=device)
        if self.plane_extent == "grid":
            steps = (steps + 0.5) * (self.grid_size / count) - 0.5
        return steps if forward else self.grid_size - 1 - steps

    def extra_repr(self) -> str:
        return (
            f"{super().extra_repr()}, grid_size={self.grid_size}, plane_axis={self.plane_axis!r}, "
            f"orientation={self.orientation}, plane_extent={self.plane_extent!r}"
        )


def _signed_axis(name: str) -> tuple[int, bool]:
    """ "-y" -> (1, False); "x" and "+x" -> (0, True)."""
    sign, axis = (name[0], name[1:]) if name[:1] in ("+", "-") else ("+", name)
    if axis not in _AXES:
        raise ValueError(f'an axis is one of "x", "y", "z", optionally signed like "+x" or "-y"; got {name!r}')
    return _AXES[axis], sign == "+"
