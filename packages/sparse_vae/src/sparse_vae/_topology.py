"""Which voxels are active, and everything that follows from that alone."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import cached_property
from typing import NamedTuple, TypeVar

import torch
from jaxtyping import Int
from torch import Tensor

from sparse_vae._layout import AttentionLayout

T = TypeVar("T")

DENSE_TABLE_LIMIT = 2**26
"""Neighbour search uses a dense lookup table up to this many cells (256 MB of int32), a binary search above."""


class Coarsening(NamedTuple):
    """A topology pooled over 2x2x2 regions.

    Attributes:
        topology: the coarse topology, with half the grid size.
        parent: int64 [N], coarse row of every fine row.
        octant: int64 [N], place of the fine voxel in its region: 4 (x mod 2) + 2 (y mod 2) + (z mod 2).
    """

    topology: Topology
    parent: Int[Tensor, " N"]
    octant: Int[Tensor, " N"]


class Topology:
    """Active voxels of a batch of objects on one grid.

    Rows are sorted lexicographically by (object, x, y, z), unique, and in range; the constructor checks this (one host
    synchronisation) and `from_coords` brings any coordinates into that order. All that is derived from the coordinates
    (offsets, neighbours, windows, the coarser level, whatever a model memoises) is computed once and shared by every
    `SparseTensor` on the topology. Topologies are compared by identity and must not be mutated.

    Args:
        coords: int32 [N, 4], rows (object, x, y, z).
        grid_size: voxels along each axis; coordinates lie in [0, grid_size).
        batch_size: number of objects; objects without voxels are allowed.

    Raises:
        ValueError: wrong shape or dtype, rows out of range, unsorted, or repeated.
    """

    def __init__(self, coords: Int[Tensor, "N 4"], grid_size: int, batch_size: int):
        _check_form(coords, grid_size, batch_size)
        self.coords = coords
        self.grid_size = grid_size
        self.batch_size = batch_size
        self._memo: dict[Hashable, object] = {}
        in_range, ascending = torch.stack([_in_range(coords, grid_size, batch_size), self._is_ascending()]).tolist()
        if not in_range:
            raise ValueError(_range_message(coords, grid_size, batch_size))
        if not ascending:
            raise ValueError(
                "coords must be sorted by (object, x, y, z) without repeated rows: use Topology.from_coords"
            )

    @classmethod
    def _trusted(cls, coords: Tensor, grid_size: int, batch_size: int) -> Topology:
        """A topology from rows that are known to satisfy the invariants."""
        self = cls.__new__(cls)
        self.coords, self.grid_size, self.batch_size, self._memo = coords, grid_size, batch_size, {}
        return self

    @classmethod
    def from_coords(
        cls,
        coords: Sequence[Int[Tensor, "L 3"]] | Int[Tensor, "N 4"],
        grid_size: int,
        batch_size: int | None = None,
    ) -> tuple[Topology, Int[Tensor, " N"]]:
        """Topology of coordinates in any order.

        Args:
            coords: one [L, 3] integer tensor (x, y, z) an object, or rows (object, x, y, z) of all objects [N, 4].
            grid_size: voxels along each axis.
            batch_size: number of objects; by default the length of the list, or the largest object index plus one.

        Returns:
            The topology, and `order` (int64 [N]): its row i is row `order[i]` of the (concatenated) input, so that
            `features[order]` belongs to the topology and `out[order] = features` undoes it.

        Raises:
            ValueError: coordinates that are not integers, out of range, or given twice.
        """
        if isinstance(coords, Tensor):
            rows = coords
        else:
            if batch_size is not None and batch_size != len(coords):
                raise ValueError(f"batch_size is {batch_size} but coords lists {len(coords)} objects")
            batch_size = len(coords)
            rows = _join(coords)
        if batch_size is None:
            batch_size = int(rows[:, 0].max()) + 1 if len(rows) else 0
        if rows.dtype in (torch.int16, torch.int64, torch.uint8):
            rows = rows.to(torch.int32)
        _check_form(rows, grid_size, batch_size)
        if not bool(_in_range(rows, grid_size, batch_size)):
            raise ValueError(_range_message(rows, grid_size, batch_size))
        order = torch.argsort(_keys(rows, grid_size))
        topology = cls._trusted(rows[order], grid_size, batch_size)
        if not bool(topology._is_ascending()):
            repeated = topology.coords[1:][topology.keys[1:] == topology.keys[:-1]]
            raise ValueError(
                f"coords repeat {len(repeated)} rows, for example (object, x, y, z) = {tuple(repeated[0].tolist())}: "
                "give every voxel once"
            )
        return topology, order

    @classmethod
    def full(cls, batch_size: int, grid_size: int, device: torch.device | str | None = None) -> Topology:
        """Topology in which every voxel of the grid is active, for dense data; rows run like `x.flatten(2)`."""
        axes = [torch.arange(n, dtype=torch.int32, device=device) for n in (batch_size, *[grid_size] * 3)]
        return cls._trusted(torch.cartesian_prod(*axes), grid_size, batch_size)

    def __len__(self) -> int:
        return len(self.coords)

    def __repr__(self) -> str:
        return (
            f"Topology({len(self)} voxels of {self.batch_size} objects, grid_size={self.grid_size}, "
            f"device={str(self.device)!r})"
        )

    @property
    def device(self) -> torch.device:
        return self.coords.device

    def to(self, device: torch.device | str) -> Topology:
        """The topology on another device (itself when it is there already); memoised values stay behind."""
        coords = self.coords.to(device)
        return self if coords is self.coords else Topology._trusted(coords, self.grid_size, self.batch_size)

    def memo(self, key: Hashable, factory: Callable[[], T]) -> T:
        """Value derived from the coordinates: `factory()` at the first call with `key`, the same object afterwards.

        The key must name every input of the factory other than the topology itself. The value dies with the topology.
        """
        if key not in self._memo:
            # Made outside inference mode, since a value made by a sampler may be used in training later.
            with torch.inference_mode(False), torch.no_grad():
                self._memo[key] = factory()
        return self._memo[key]  # type: ignore[return-value]

    @cached_property
    @torch.inference_mode(False)
    def keys(self) -> Int[Tensor, " N"]:
        """int64 [N], the linear index ((object G + x) G + y) G + z of every row, strictly ascending."""
        return _keys(self.coords, self.grid_size)

    @cached_property
    @torch.inference_mode(False)
    def batch_index(self) -> Int[Tensor, " N"]:
        """int64 [N], the object of every row."""
        return self.coords[:, 0].long()

    @cached_property
    @torch.inference_mode(False)
    def offsets(self) -> Int[Tensor, " B_plus_1"]:
        """int32 [B + 1], first row of every object, then N ("cu_seqlens")."""
        objects = torch.arange(self.batch_size + 1, device=self.device)
        return torch.searchsorted(self.keys, objects * self.grid_size**3).int()

    @cached_property
    def lengths(self) -> list[int]:
        """Voxels of every object (one host synchronisation at the first use)."""
        return self.offsets.diff().tolist()

    @property
    def max_length(self) -> int:
        """Voxels of the largest object."""
        return max(self.lengths, default=0)

    @property
    def layout(self) -> AttentionLayout:
        """Attention layout in which every object attends to itself."""
        return self.memo("layout", lambda: AttentionLayout.from_lengths(self.lengths, self.device))

    def windows(self, size: int, shift: int = 0) -> AttentionLayout:
        """Attention layout of cubic windows.

        A voxel belongs to window `(coordinate + shift) // size` of its object. As in TRELLIS the shift moves the
        window borders only: there is no cyclic roll and no mask, windows at the rim are just smaller.

        Args:
            size: side of a window in voxels, at least 1.
            shift: offset in voxels, in [0, size).
        """
        if size < 1 or not 0 <= shift < size:
            raise ValueError(f"windows need size >= 1 and 0 <= shift < size, got size={size}, shift={shift}")
        if shift == 0 and size >= self.grid_size:
            return self.layout
        return self.memo(("windows", size, shift), lambda: self._make_windows(size, shift))

    def _make_windows(self, size: int, shift: int) -> AttentionLayout:
        cells = (self.grid_size - 1 + shift) // size + 1
        window = (self.coords[:, 1:] + shift) // size
        keys = _keys(torch.cat([self.coords[:, :1], window], dim=1), cells)
        keys, order = torch.sort(keys, stable=True)
        _, lengths = torch.unique_consecutive(keys, return_counts=True)
        return AttentionLayout.from_lengths(lengths.tolist(), self.device, order=order)

    def coarser(self) -> Coarsening:
        """The topology pooled over 2x2x2 regions, with the relation between the two.

        The fine topology keeps the pair, so going down and up again ends on the very same objects.

        Raises:
            ValueError: the grid size is odd.
        """
        if self.grid_size % 2:
            raise ValueError(f"a grid of {self.grid_size} voxels cannot be halved: its size must be even")
        return self.memo("coarser", self._make_coarser)

    def _make_coarser(self) -> Coarsening:
        coarse_size = self.grid_size // 2
        batch, voxel = self.coords[:, :1], self.coords[:, 1:]
        keys, parent = torch.unique(_keys(torch.cat([batch, voxel // 2], dim=1), coarse_size), return_inverse=True)
        octant = (voxel % 2 * voxel.new_tensor([4, 2, 1])).sum(dim=1)
        coords = torch.stack(
            [keys // coarse_size**3, keys // coarse_size**2 % coarse_size, keys // coarse_size % coarse_size,
             keys % coarse_size], dim=1,
        )  # fmt: skip
        return Coarsening(Topology._trusted(coords.int(), coarse_size, self.batch_size), parent, octant.long())

    def children(self) -> Int[Tensor, "8 M"]:
        """int64 [8, M]: fine row at every octant of the M voxels of `coarser()`, N (= len(self)) where absent."""
        return self.memo("children", self._make_children)

    def _make_children(self) -> Tensor:
        coarse, parent, octant = self.coarser()
        table = torch.full((8, len(coarse)), len(self), dtype=torch.int64, device=self.device)
        table[octant, parent] = torch.arange(len(self), device=self.device)
        return table

    def subdivide(self) -> Topology:
        """The topology on a grid of twice the size in which every voxel is split into its eight octants."""
        octants = torch.cartesian_prod(*[torch.arange(2, dtype=torch.int32, device=self.device)] * 3)
        voxels = (self.coords[:, None, 1:] * 2 + octants).flatten(0, 1)
        rows = torch.cat([self.coords[:, :1].repeat_interleave(8, dim=0), voxels], dim=1)
        return Topology.from_coords(rows, self.grid_size * 2, self.batch_size)[0]

    def neighbours(self, kernel_size: int = 3) -> Int[Tensor, "K N"]:
        """Neighbour rows of every voxel in a cubic neighbourhood.

        Args:
            kernel_size: odd side of the neighbourhood.

        Returns:
            int64 [kernel_size**3, N]; entry [k, i] is the row of the voxel at `coords[i] + offset[k]` in the same
            object, or N where that voxel is not active. Offsets run from (-r, -r, -r) to (r, r, r), z fastest.
        """
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd and positive, got {kernel_size}")
        return self.memo(("neighbours", kernel_size), lambda: self._make_neighbours(kernel_size // 2))

    def _make_neighbours(self, radius: int) -> Tensor:
        # A margin of `radius` empty cells around every object makes each shifted voxel a plain linear offset.
        padded = self.grid_size + 2 * radius
        shifted = torch.cat([self.coords[:, :1], self.coords[:, 1:] + radius], dim=1)
        keys = _keys(shifted, padded)
        steps = torch.arange(-radius, radius + 1, device=self.device)
        strides = steps.new_tensor([padded**2, padded, 1])
        offsets = (torch.cartesian_prod(steps, steps, steps).reshape(-1, 3) * strides).sum(dim=1)
        wanted = keys + offsets[:, None]
        num_cells = self.batch_size * padded**3
        if num_cells <= DENSE_TABLE_LIMIT:
            table = torch.full((num_cells,), len(self), dtype=torch.int32, device=self.device)
            table[keys] = torch.arange(len(self), dtype=torch.int32, device=self.device)
            return table[wanted].long()
        found = torch.searchsorted(keys, wanted).clamp_(max=max(len(self) - 1, 0))
        return torch.where(keys[found] == wanted, found, len(self))

    def _is_ascending(self) -> Tensor:
        return (self.keys[1:] > self.keys[:-1]).all()


def _keys(rows: Tensor, size: int) -> Tensor:
    b, x, y, z = rows.long().unbind(dim=1)
    return ((b * size + x) * size + y) * size + z


def _in_range(rows: Tensor, grid_size: int, batch_size: int) -> Tensor:
    limit = rows.new_tensor([batch_size, grid_size, grid_size, grid_size])
    return ((rows >= 0) & (rows < limit)).all()


def _range_message(rows: Tensor, grid_size: int, batch_size: int) -> str:
    low, high = rows.amin(dim=0).tolist(), rows.amax(dim=0).tolist()
    return (
        f"coords (object, x, y, z) span {low} to {high}, expected objects in [0, {batch_size}) and "
        f"voxels in [0, {grid_size})"
    )


def _check_form(rows: Tensor, grid_size: int, batch_size: int) -> None:
    if rows.ndim != 2 or rows.shape[1] != 4:
        raise ValueError(f"coords have shape {tuple(rows.shape)}, expected [N, 4] with rows (object, x, y, z)")
    if rows.dtype != torch.int32:
        raise ValueError(f"coords have dtype {rows.dtype}, expected torch.int32")
    if grid_size < 1 or batch_size < 0:
        raise ValueError(f"grid_size must be positive and batch_size not negative, got {grid_size} and {batch_size}")


def _join(objects: Sequence[Tensor]) -> Tensor:
    """Rows (object, x, y, z) of a list of [L, 3] coordinates."""
    if not objects:
        return torch.empty(0, 4, dtype=torch.int32)
    for number, voxels in enumerate(objects):
        if voxels.ndim != 2 or voxels.shape[1] != 3:
            raise ValueError(f"coords of object {number} have shape {tuple(voxels.shape)}, expected [L, 3]")
        if voxels.dtype.is_floating_point or voxels.dtype == torch.bool:
            raise ValueError(f"coords of object {number} have dtype {voxels.dtype}, expected integers")
    return torch.cat([torch.nn.functional.pad(v.int(), (1, 0), value=b) for b, v in enumerate(objects)])
