"""What the stages read. Every batch is a function of (seed, item) alone."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod

import torch
from jaxtyping import Float, Int
from sparse_vae import SparseTensor, Topology
from torch import Tensor

from diff2to3._errors import InputError
from diff2to3.data._augment import yaw_matrix
from diff2to3.train._data import DamagedObjectError, SplitData
from diff2to3.train._stage import Batch

_MIRROR = torch.diag(torch.tensor([-1.0, 1.0, 1.0, 1.0]))
_MOST_DAMAGED = 16  # objects of one batch; more of them mean that the disk is the matter


class ObjectBatches(ABC):
    """Batches of some objects each. A damaged object is said once, and the next one takes its place."""

    def __init__(self, data: SplitData) -> None:
        self.data = data
        self._said: set[int] = set()

    def __getitem__(self, item: int) -> Batch:
        damaged: frozenset[int] = frozenset()  # of this batch alone: what was read before must not change it
        while True:
            try:
                objects, generator = self.data.draw(item, damaged)
                batch = self.make(objects, generator)
                return batch | {"batch_size": len(objects), "seed": generator.initial_seed()}
            except DamagedObjectError as error:
                damaged |= {error.number}
                if len(damaged) >= min(_MOST_DAMAGED, len(self.data)):
                    raise InputError(f"item {item}: {len(damaged)} of its objects cannot be read; {error}") from error
                if error.number not in self._said:
                    self._said.add(error.number)
                    print(f"train: {error}; another object takes its place", file=sys.stderr)

    @abstractmethod
    def make(self, objects: Int[Tensor, " B"], generator: torch.Generator) -> Batch:
        """The batch of these objects; what is random in it comes from the generator."""


def _integers(high: int, count: int, generator: torch.Generator) -> Int[Tensor, " B"]:
    return torch.randint(high, (count,), generator=generator)


class PictureBatches(ObjectBatches):
    """RGBA pictures ``image`` [B, 4, H, W] uint8: views and condition crops, half each."""

    def make(self, objects: Int[Tensor, " B"], generator: torch.Generator) -> Batch:
        half = len(objects) // 2
        parts = []
        for kind, chosen in (("view", objects[:half]), ("condition", objects[half:])):
            index = _integers(self.data.num_pictures(kind), len(chosen), generator)
            if len(chosen):
                parts.append(self.data.pictures(kind, chosen, index))
        return {"image": torch.cat(parts)}


class OccupancyBatches(ObjectBatches):
    """Surface voxels ``coords`` [N, 4] int32 (object, x, y, z), at random quarter turns, mirrored half of the time."""

    def __init__(self, data: SplitData, grid_size: int) -> None:
        super().__init__(data)
        self.grid_size = grid_size

    def make(self, objects: Int[Tensor, " B"], generator: torch.Generator) -> Batch:
        turn, mirror = (_integers(n, len(objects), generator) for n in (4, 2))
        coords, batch = self.data.voxels(objects)
        placed = place(coords, batch, mirror, turn, self.grid_size)
        return {"coords": placed}


class ViewBatches(ObjectBatches):
    """Lifted features with one view each to compare a rendering with.

    ``features`` is a SparseTensor [N, C]; ``image`` [B, 4, H, W] uint8 RGBA; ``pose`` [B, 4, 4], ``intrinsics``
    [B, 3, 3]; ``hue`` [B] degrees that the target is to be turned by.
    """

    def __init__(self, data: SplitData, grid_size: int) -> None:
        super().__init__(data)
        self.grid_size = grid_size

    def make(self, objects: Int[Tensor, " B"], generator: torch.Generator) -> Batch:
        data, count = self.data, len(objects)
        turn = _integers(4, count, generator)
        variant = _integers(data.num_variants(), count, generator)
        view = _integers(data.num_pictures("view"), count, generator)
        hue, mirror = data.variants(objects, variant)
        coords, batch = data.voxels(objects)
        rows = data.rows("features", objects, variant)
        pose = data.table("view_pose", objects, view)
        flip = _MIRROR.to(pose)
        pose = torch.where(mirror.bool()[:, None, None], flip @ pose @ flip, pose)
        turns = torch.stack([yaw_matrix(k).mT for k in range(4)]).to(pose)
        placed = place(coords, batch, mirror, turn, self.grid_size)
        return {
            "features": sparse(rows.float(), placed, self.grid_size, count),
            "image": flip_where(data.pictures("view", objects, view), mirror),
            "pose": pose @ turns[turn.to(pose.device)],
            "intrinsics": data.table("view_intrinsics", objects, view),
            "hue": hue,
        }


class ConditionBatches(ObjectBatches):
    """Condition crops, and their objects as they lie in the frame that the crop asks for.

    ``condition`` [B, V, 4, H, W] uint8 RGBA, ``hue`` [B]; ``object``, ``mirror`` and ``turn`` [B]: which objects,
    whether mirrored in x, and then turned by how many quarter turns. ``with_latents`` those too, a SparseTensor [N, C];
    ``with_voxels`` their ``coords`` [N, 4]. V differs from batch to batch, 1 to ``views`` at random, and the views of
    an object differ; the first one decides the frame.
    """

    def __init__(
        self,
        data: SplitData,
        grid_size: int,
        frame: str,
        *,
        views: int = 1,
        with_latents: bool = False,
        with_voxels: bool = False,
    ) -> None:
        super().__init__(data)
        self.grid_size, self.frame, self.views = grid_size, frame, views
        self.with_latents, self.with_voxels = with_latents, with_voxels

    def make(self, objects: Int[Tensor, " B"], generator: torch.Generator) -> Batch:
        data, count = self.data, len(objects)
        view = self._views(count, generator)
        azimuth = data.table("condition_azimuth", objects, view[:, 0])
        if self.with_latents:
            variant = _integers(data.num_variants(), count, generator)
            hue, mirror = data.variants(objects, variant)
        else:
            hue = (torch.rand(count, generator=generator) * 360).to(azimuth.device)
            mirror = _integers(2, count, generator).to(azimuth.device)
        azimuth = torch.where(mirror.bool(), -azimuth, azimuth)
        turn = torch.zeros_like(mirror)
        if self.frame == "view-snapped":
            turn = (-(azimuth / 90).round().long()) % 4
        shown = view.shape[1]
        pictures = data.pictures("condition", objects.repeat_interleave(shown), view.flatten())
        result: Batch = {
            "condition": flip_where(pictures, mirror.repeat_interleave(shown)).unflatten(0, view.shape),
            "hue": hue,
            "object": objects.to(azimuth.device),
            "mirror": mirror,
            "turn": turn,
        }
        if self.with_latents or self.with_voxels:
            coords, batch = data.voxels(objects)
            result["coords"] = place(coords, batch, mirror, turn, self.grid_size)
        if self.with_latents:
            latents = data.rows("latents", objects, variant, turn).float()
            result["latents"] = sparse(latents, result.pop("coords"), self.grid_size, count)
        return result

    def _views(self, count: int, generator: torch.Generator) -> Int[Tensor, "B V"]:
        available = self.data.num_pictures("condition")
        if self.views == 1:
            return _integers(available, count, generator)[:, None]
        shown = 1 + int(_integers(min(self.views, available), 1, generator))
        return torch.rand(count, available, generator=generator).argsort(dim=1)[:, :shown]


def sparse(rows: Float[Tensor, "N C"], coords: Int[Tensor, "N 4"], grid_size: int, batch_size: int) -> SparseTensor:
    """Rows on their voxels, in the order of the topology."""
    topology, order = Topology.from_coords(coords, grid_size, batch_size)
    return SparseTensor(rows[order], topology)


def place(
    coords: Int[Tensor, "N 3"],
    batch: Int[Tensor, " N"],
    mirror: Int[Tensor, " B"],
    turn: Int[Tensor, " B"],
    grid_size: int,
) -> Int[Tensor, "N 4"]:
    """Rows (object, x, y, z) with each object mirrored in x where asked, then turned by its quarter turns."""
    mirror, turn = mirror.to(coords.device), turn.to(coords.device)
    x, y, z = coords.unbind(1)
    last = grid_size - 1
    x = torch.where(mirror[batch].bool(), last - x, x)
    quarter = turn[batch][None] == torch.arange(4, device=coords.device)[:, None]
    new_x = (torch.stack([x, last - y, last - x, y]) * quarter).sum(0)
    new_y = (torch.stack([y, x, last - y, last - x]) * quarter).sum(0)
    return torch.stack([batch, new_x, new_y, z], 1).int()


def flip_where(pictures: Tensor, mirror: Int[Tensor, " B"]) -> Tensor:
    """Pictures [B, C, H, W], left-right flipped where ``mirror`` is not zero."""
    return torch.where(mirror.bool()[:, None, None, None], pictures.flip(-1), pictures)
