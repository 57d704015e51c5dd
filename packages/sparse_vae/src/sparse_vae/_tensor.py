"""Features on active voxels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from sparse_vae._topology import Topology


@dataclass(frozen=True, eq=False)
class SparseTensor:
    """One feature vector for every active voxel of a batch of objects.

    Attributes:
        features: [N, C], row i belongs to `topology.coords[i]`.
        topology: the active voxels, shared by all tensors on them.

    Raises:
        ValueError: the rows or the devices of the two do not match.
    """

    features: Float[Tensor, "N C"]
    topology: Topology

    def __post_init__(self) -> None:
        if self.features.ndim != 2 or len(self.features) != len(self.topology):
            raise ValueError(
                f"features have shape {tuple(self.features.shape)}, expected [{len(self.topology)}, C]: "
                "one row for every voxel of the topology"
            )
        if self.features.device != self.topology.device:
            raise ValueError(
                f"features are on {self.features.device} but the topology is on {self.topology.device}: move one"
            )

    @classmethod
    def from_coords(
        cls,
        coords: Sequence[Int[Tensor, "L 3"]] | Int[Tensor, "N 4"],
        features: Sequence[Float[Tensor, "L C"]] | Float[Tensor, "N C"],
        grid_size: int,
        batch_size: int | None = None,
    ) -> SparseTensor:
        """Tensor from voxels in any order; see `Topology.from_coords` for the arguments.

        Args:
            coords: one [L, 3] tensor an object, or [N, 4] rows (object, x, y, z).
            features: one [L, C] tensor an object, or [N, C], in the order of `coords`.
            grid_size: voxels along each axis.
            batch_size: number of objects.
        """
        rows = features if isinstance(features, Tensor) else torch.cat(list(features))
        topology, order = Topology.from_coords(coords, grid_size, batch_size)
        if len(rows) != len(order):
            raise ValueError(f"{len(rows)} feature rows for {len(order)} voxels: give one row a voxel")
        return cls(rows[order], topology)

    @property
    def num_channels(self) -> int:
        return self.features.shape[1]

    @property
    def device(self) -> torch.device:
        return self.features.device

    @property
    def dtype(self) -> torch.dtype:
        return self.features.dtype

    def replace(self, features: Float[Tensor, "N C2"]) -> SparseTensor:
        """Other features on the same voxels."""
        return SparseTensor(features, self.topology)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> SparseTensor:
        """The tensor on another device or with features of another dtype; the topology moves along."""
        topology = self.topology if device is None else self.topology.to(device)
        return SparseTensor(self.features.to(device=topology.device, dtype=dtype), topology)

    @staticmethod
    def cat(tensors: Sequence[SparseTensor]) -> SparseTensor:
        """Concatenate the channels of tensors that share one topology object."""
        first = tensors[0]
        if any(tensor.topology is not first.topology for tensor in tensors):
            raise ValueError("the tensors lie on different topologies: channels can only be joined on the same voxels")
        return first.replace(torch.cat([tensor.features for tensor in tensors], dim=1))

    @staticmethod
    def batch(tensors: Sequence[SparseTensor]) -> SparseTensor:
        """Put the objects of several tensors into one batch, in order."""
        sizes = {tensor.topology.grid_size for tensor in tensors}
        if len(sizes) != 1:
            raise ValueError(f"cannot batch tensors with grid sizes {sorted(sizes)}: one grid size is needed")
        rows, batch_size = [], 0
        for tensor in tensors:
            coords = tensor.topology.coords
            rows.append(coords + coords.new_tensor([batch_size, 0, 0, 0]))
            batch_size += tensor.topology.batch_size
        topology = Topology._trusted(torch.cat(rows), sizes.pop(), batch_size)
        return SparseTensor(torch.cat([tensor.features for tensor in tensors]), topology)

    def unbatch(self) -> list[SparseTensor]:
        """One tensor an object, the opposite of `batch`."""
        pieces = []
        for coords, features in zip(
            self.topology.coords.split(self.topology.lengths), self.split(self.features), strict=True
        ):
            coords = torch.cat([torch.zeros_like(coords[:, :1]), coords[:, 1:]], dim=1)
            pieces.append(SparseTensor(features, Topology._trusted(coords, self.topology.grid_size, 1)))
        return pieces

    def split(self, rows: Shaped[Tensor, "N ..."]) -> list[Shaped[Tensor, "L ..."]]:
        """Views of `rows` (anything with one row a voxel), one an object."""
        return list(rows.split(self.topology.lengths))
