"""What the stages read. A split is held in memory, on the device that trains, and every batch is gathered there.

An object of 44 pictures at 256^2 takes 11.5 MB. Every batch is a function of (seed, step) alone.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from sparse_vae import SparseTensor, Topology
from torch import Tensor

from diff2to3._errors import InputError
from diff2to3._progress import track
from diff2to3.data._augment import yaw_matrix
from diff2to3.data._store import Store, decode_png
from diff2to3.train._config import TrainConfig

Batch = dict[str, Any]
_MIRROR = torch.diag(torch.tensor([-1.0, 1.0, 1.0, 1.0]))


class Ragged:
    """Rows of many objects in one tensor: ``rows`` [..., sum L, C] with the voxels on the axis before the last."""

    def __init__(self, parts: list[Tensor], device: torch.device) -> None:
        self.lengths = torch.tensor([part.shape[-2] for part in parts])
        self.starts = torch.cat([torch.zeros(1, dtype=torch.long), self.lengths.cumsum(0)])[:-1].to(device)
        self.rows = torch.cat(parts, dim=-2).to(device)

    def select(self, objects: Int[Tensor, " B"]) -> tuple[Int[Tensor, " N"], Int[Tensor, " N"]]:
        """Which object of the batch each gathered row belongs to, and its place in ``rows``."""
        lengths, device = self.lengths[objects], self.rows.device
        total = int(lengths.sum())
        starts = (lengths.cumsum(0) - lengths).to(device)
        batch = torch.arange(len(objects), device=device).repeat_interleave(lengths.to(device), output_size=total)
        return batch, torch.arange(total, device=device) - starts[batch] + self.starts[objects.to(device)][batch]


class ObjectData:
    """The objects of one split that a stage of the data has reached; reads what a training stage asks for, once.

    Raises:
        LookupError: the split is empty.
    """

    def __init__(self, config: TrainConfig, split: str, needs: str, device: torch.device) -> None:
        self.store, self.device, self.config = Store(Path(config.data)), device, config
        rows = self.store.objects(split)
        self.ids = [row["id"] for row in rows if self.store.path(needs, row["id"]).is_file()][: config.max_objects]
        if not self.ids:
            raise LookupError(f"{config.data}: split {split!r} has no object with stage {needs!r}")

    def draw(self, step: int) -> tuple[Int[Tensor, " B"], torch.Generator]:
        """Objects of a step, and the generator of everything else that is random in its batch.

        Whole passes over the split, each in its own order, so that every object is seen equally often.
        """
        size, count = self.config.batch_size, len(self.ids)
        epochs = range(step * size // count, (step * size + size - 1) // count + 1)
        orders = np.concatenate([np.random.default_rng([self.config.seed, e, 7]).permutation(count) for e in epochs])
        first = step * size - epochs[0] * count
        [state] = np.random.SeedSequence([self.config.seed, step]).generate_state(1, np.uint64)
        return torch.from_numpy(orders[first : first + size]), torch.Generator().manual_seed(int(state) >> 1)

    @cached_property
    def coords(self) -> Ragged:
        """Surface voxels, rows [sum L, 3] int32."""
        return Ragged([torch.from_numpy(a.astype(np.int32)) for a in self._read("voxels", "coords")], self.device)

    @cached_property
    def features(self) -> Ragged:
        """Lifted features, rows [K, sum L, C] fp16."""
        return Ragged([torch.from_numpy(a) for a in self._read("features", "features")], self.device)

    @cached_property
    def latents(self) -> Ragged:
        """2to3-VAE latents, rows [K, 4, sum L, C] fp16."""
        return Ragged([torch.from_numpy(a) for a in self._read("latents", "latents")], self.device)

    @cached_property
    def variants(self) -> tuple[Float[Tensor, "n K"], Int[Tensor, "n K"]]:
        """Hue in degrees and mirroring of every object's colour variants."""
        hue = torch.from_numpy(np.stack(self._read("features", "hue")))
        mirrored = torch.from_numpy(np.stack(self._read("features", "mirrored"))).long()
        return hue.to(self.device), mirrored.to(self.device)

    @cached_property
    def views(self) -> Tensor:
        """View pictures [n, V, 4, H, W] uint8."""
        return self._pictures("view")

    @cached_property
    def conditions(self) -> Tensor:
        """Condition crops [n, V, 4, H, W] uint8."""
        return self._pictures("condition")

    def table(self, name: str) -> Tensor:
        """A small array of the render stage, stacked over the objects, cut to the views that all have."""
        arrays = self._read("render", name)
        count = min(map(len, arrays))
        return torch.from_numpy(np.stack([a[:count] for a in arrays])).to(self.device)

    def _read(self, stage: str, key: str) -> list[np.ndarray]:
        from safetensors import safe_open

        def read(object_id: str) -> np.ndarray:
            with safe_open(self.store.path(stage, object_id), "numpy") as file:
                return file.get_tensor(key)

        return [read(object_id) for object_id in self.ids]

    def _pictures(self, kind: str) -> Tensor:
        bounds = self._read("render", f"{kind}_bounds")
        count = min(len(b) for b in bounds) - 1
        if count < 1:
            raise InputError(f"{self.store.root}: no {kind} pictures were rendered")

        def decode(index: int) -> np.ndarray:
            png = self.store.read("render", self.ids[index])[f"{kind}_png"]
            return np.stack([decode_png(png, bounds[index], v) for v in range(count)])

        first = decode(0)
        pictures = torch.empty(len(self.ids), *first.shape, dtype=torch.uint8, device=self.device)
        with ThreadPoolExecutor(os.cpu_count()) as pool:  # inflating a PNG releases the interpreter lock
            decoded: Iterable[np.ndarray] = pool.map(decode, range(len(self.ids)))
            for index, stack in enumerate(track(decoded, f"{kind} pictures", total=len(self.ids))):
                pictures[index] = torch.from_numpy(stack).to(self.device, non_blocking=True)
        return pictures.permute(0, 1, 4, 2, 3)


def _integers(high: int, count: int, generator: torch.Generator) -> Tensor:
    return torch.randint(high, (count,), generator=generator)


class PictureBatches:
    """RGBA pictures ``image`` [B, 4, H, W] uint8: views and condition crops, half each."""

    def __init__(self, data: ObjectData) -> None:
        self.data, self.pictures = data, (data.views, data.conditions)

    def __getitem__(self, step: int) -> Batch:
        objects, generator = self.data.draw(step)
        half = len(objects) // 2
        parts = [
            pictures[chosen, _integers(pictures.shape[1], len(chosen), generator)]
            for pictures, chosen in zip(self.pictures, (objects[:half], objects[half:]), strict=True)
        ]
        return {"image": torch.cat(parts), "seed": generator.initial_seed()}


class OccupancyBatches:
    """Surface voxels ``coords`` [N, 4] int32 (object, x, y, z), at random quarter turns, mirrored half of the time."""

    def __init__(self, data: ObjectData, grid_size: int) -> None:
        self.data, self.grid_size = data, grid_size

    def __getitem__(self, step: int) -> Batch:
        objects, generator = self.data.draw(step)
        turn, mirror = (_integers(n, len(objects), generator).to(self.data.device) for n in (4, 2))
        batch, rows = self.data.coords.select(objects)
        coords = place(self.data.coords.rows[rows], batch, mirror, turn, self.grid_size)
        return {"coords": coords, "batch_size": len(objects), "seed": generator.initial_seed()}


class ViewBatches:
    """Lifted features with one view each to compare a rendering with.

    ``features`` is a SparseTensor [N, C]; ``image`` [B, 4, H, W] uint8 RGBA; ``pose`` [B, 4, 4], ``intrinsics``
    [B, 3, 3]; ``hue`` [B] degrees that the target is to be turned by.
    """

    def __init__(self, data: ObjectData, grid_size: int) -> None:
        self.data, self.grid_size = data, grid_size
        self.pose, self.intrinsics = data.table("view_pose"), data.table("view_intrinsics")

    def __getitem__(self, step: int) -> Batch:
        data = self.data
        objects, generator = data.draw(step)
        count, chosen = len(objects), objects.to(data.device)
        hues, mirrors = data.variants
        turn = _integers(4, count, generator).to(data.device)
        variant = _integers(hues.shape[1], count, generator).to(data.device)
        view = _integers(data.views.shape[1], count, generator).to(data.device)
        mirror = mirrors[chosen, variant]
        batch, rows = data.coords.select(objects)
        pose = self.pose[chosen, view]
        flip = _MIRROR.to(pose)
        pose = torch.where(mirror.bool()[:, None, None], flip @ pose @ flip, pose)
        turns = torch.stack([yaw_matrix(k).mT for k in range(4)]).to(pose)
        coords = place(data.coords.rows[rows], batch, mirror, turn, self.grid_size)
        return {
            "features": sparse(data.features.rows[variant[batch], rows].float(), coords, self.grid_size, count),
            "image": flip_where(data.views[chosen, view], mirror),
            "pose": pose @ turns[turn],
            "intrinsics": self.intrinsics[chosen, view],
            "hue": hues[chosen, variant],
            "seed": generator.initial_seed(),
        }


class ConditionBatches:
    """Condition crops, and how their objects lie in the frame that the crop asks for.

    ``condition`` [B, 4, H, W] uint8 RGBA, ``hue`` [B]; ``object``, ``mirror`` and ``turn`` [B]: which objects, whether
    mirrored in x, and then turned by how many quarter turns. With ``latents`` those too, a SparseTensor [N, C].
    """

    def __init__(self, data: ObjectData, grid_size: int, frame: str, latents: bool) -> None:
        self.data, self.grid_size, self.frame, self.latents = data, grid_size, frame, latents
        self.azimuth = data.table("condition_azimuth")

    def __getitem__(self, step: int) -> Batch:
        data = self.data
        objects, generator = data.draw(step)
        count, chosen = len(objects), objects.to(data.device)
        view = _integers(data.conditions.shape[1], count, generator).to(data.device)
        if self.latents:
            hues, mirrors = data.variants
            variant = _integers(hues.shape[1], count, generator).to(data.device)
            hue, mirror = hues[chosen, variant], mirrors[chosen, variant]
        else:
            hue = (torch.rand(count, generator=generator) * 360).to(data.device)
            mirror = _integers(2, count, generator).to(data.device)
        azimuth = self.azimuth[chosen, view]
        azimuth = torch.where(mirror.bool(), -azimuth, azimuth)
        turn = (-(azimuth / 90).round().long()) % 4 if self.frame == "view-snapped" else torch.zeros_like(view)
        result = {
            "condition": flip_where(data.conditions[chosen, view], mirror),
            "hue": hue,
            "object": chosen,
            "mirror": mirror,
            "turn": turn,
            "seed": generator.initial_seed(),
        }
        if not self.latents:
            return result
        batch, rows = data.coords.select(objects)
        coords = place(data.coords.rows[rows], batch, mirror, turn, self.grid_size)
        latents = data.latents.rows[variant[batch], turn[batch], rows].float()
        return result | {"latents": sparse(latents, coords, self.grid_size, count)}


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
