"""The tensors that batches are made of: held in memory on the training device, or read from disk when they are due.

Both give the same values. Which objects a step sees is a function of (seed, step) alone, so that a run can stop and go
on at any step, with any number of processes and of threads that read ahead.
"""

from __future__ import annotations

import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, lru_cache
from typing import TypeVar

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from diff2to3._errors import InputError
from diff2to3._progress import track
from diff2to3.data._objects import Objects, open_objects
from diff2to3.data._store import decode_png
from diff2to3.data._tensor_file import DamagedFileError
from diff2to3.train._config import TrainConfig
from diff2to3.train._packing import Packing

_PICTURE_ERRORS = (OSError, ValueError, SyntaxError)  # what Pillow raises for a damaged PNG file
T = TypeVar("T")


class DamagedObjectError(ValueError):
    """An object of the data set cannot be read; ``number`` is its place in the split."""

    def __init__(self, number: int, reason: object) -> None:
        super().__init__(f"{reason}")
        self.number = number


def open_data(config: TrainConfig, split: str, stages: tuple[str, ...], device: torch.device) -> SplitData:
    """The objects of a split that have all stages, in the way that the config asks for.

    Raises:
        LookupError: there are none.
        InputError: the data set or its shards cannot be used.
    """
    objects = open_objects(config.data, split, stages, config.max_objects)
    return StreamedData(objects, config) if config.is_streaming else HeldData(objects, config, device)


@lru_cache(maxsize=8)  # a large split takes milliseconds
def _order(seed: int, epoch: int, count: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch, 7]).permutation(count)


class SplitData(ABC):
    """The objects of one split. Arguments ``objects``, ``view``, ``variant`` ... are [B] on the CPU."""

    def __init__(self, objects: Objects, config: TrainConfig) -> None:
        self.objects, self.config = objects, config

    def __len__(self) -> int:
        return len(self.objects)

    def draw(self, item: int, without: frozenset[int] = frozenset()) -> tuple[Int[Tensor, " B"], torch.Generator]:
        """Objects of an item, and the generator of everything else that is random in its batch.

        Whole passes over the split, each in its own order, so that every object is seen equally often. Objects
        ``without`` which the batch is to be made give their places to the ones after them; where voxels are counted
        their places stay empty.
        """
        chosen = self._in_turn(item) if self.config.max_voxels is None else self._packing[item]
        if self.config.max_voxels is not None and not without.issuperset(chosen.tolist()):
            chosen = chosen[~np.isin(chosen, list(without))]
        while without and (lost := np.isin(chosen, list(without))).any():
            chosen = np.where(lost, (chosen + 1) % len(self), chosen)
        [state] = np.random.SeedSequence([self.config.seed, item]).generate_state(1, np.uint64)
        return torch.from_numpy(chosen), torch.Generator().manual_seed(int(state) >> 1)

    def _in_turn(self, item: int) -> np.ndarray:
        size, count = self.config.batch_size, len(self)
        epochs = range(item * size // count, (item * size + size - 1) // count + 1)
        orders = np.concatenate([_order(self.config.seed, epoch, count) for epoch in epochs])
        first = item * size - epochs[0] * count
        return orders[first : first + size]

    @cached_property
    def _packing(self) -> Packing:
        budget = self.config.max_voxels
        assert budget is not None
        packing = Packing(self.num_voxels(), budget, self.config.batch_size, self.config.seed)
        if not len(packing.fitting):
            raise InputError(f"max_voxels: {budget} is less than any of {len(self)} objects has")
        if left_out := len(self) - len(packing.fitting):
            print(
                f"train: {left_out} of {len(self)} objects have over {budget} voxels and are left out", file=sys.stderr
            )
        return packing

    @abstractmethod
    def num_voxels(self) -> Int[np.ndarray, " n"]:
        """Surface voxels of every object of the split."""

    @abstractmethod
    def num_pictures(self, kind: str) -> int:
        """Pictures of a kind, ``"view"`` or ``"condition"``, that every object has."""

    @abstractmethod
    def num_variants(self) -> int:
        """Colour variants that every object has."""

    @abstractmethod
    def voxels(self, objects: Int[Tensor, " B"]) -> tuple[Int[Tensor, "N 3"], Int[Tensor, " N"]]:
        """Surface voxels, and which object of the batch each belongs to."""

    @abstractmethod
    def rows(self, stage: str, objects: Int[Tensor, " B"], *place: Int[Tensor, " B"]) -> Float[Tensor, "N C"]:
        """A row for each of the voxels.

        Args:
            stage: ``"features"`` or ``"latents"``.
            objects: which objects.
            place: entry of each object along the stage's first axes: variant, and for latents quarter turn.
        """

    @abstractmethod
    def variants(
        self, objects: Int[Tensor, " B"], variant: Int[Tensor, " B"]
    ) -> tuple[Float[Tensor, " B"], Int[Tensor, " B"]]:
        """Hue in degrees, and mirroring, of a colour variant of each object."""

    @abstractmethod
    def pictures(self, kind: str, objects: Int[Tensor, " B"], view: Int[Tensor, " B"]) -> Int[Tensor, "B 4 H W"]:
        """A picture of each object, uint8 RGBA."""

    @abstractmethod
    def table(self, name: str, objects: Int[Tensor, " B"], view: Int[Tensor, " B"]) -> Float[Tensor, "B ..."]:
        """An entry of a small array of the render stage of each object."""


class HeldData(SplitData):
    """Everything that a stage asks for is read once and stays on the device, where batches are gathered.

    An object of 44 pictures at 256^2 takes 11.5 MB. Damaged files are input errors.
    """

    def __init__(self, objects: Objects, config: TrainConfig, device: torch.device) -> None:
        super().__init__(objects, config)
        self.device = device
        self._made: dict[str, Tensor] = {}

    def num_voxels(self) -> Int[np.ndarray, " n"]:
        return self._coords.lengths.numpy()

    def num_pictures(self, kind: str) -> int:
        return self._stack(kind, self._all_pictures).shape[1]

    def num_variants(self) -> int:
        return self._table("features", "hue").shape[1]

    def voxels(self, objects: Int[Tensor, " B"]) -> tuple[Int[Tensor, "N 3"], Int[Tensor, " N"]]:
        batch, rows = self._coords.select(objects)
        return self._coords.rows[rows], batch

    def rows(self, stage: str, objects: Int[Tensor, " B"], *place: Int[Tensor, " B"]) -> Float[Tensor, "N C"]:
        data = self._features if stage == "features" else self._latents
        batch, rows = data.select(objects)
        return data.rows[(*[index.to(self.device)[batch] for index in place], rows)]

    def variants(
        self, objects: Int[Tensor, " B"], variant: Int[Tensor, " B"]
    ) -> tuple[Float[Tensor, " B"], Int[Tensor, " B"]]:
        place = objects.to(self.device), variant.to(self.device)
        return self._table("features", "hue")[place], self._table("features", "mirrored")[place].long()

    def pictures(self, kind: str, objects: Int[Tensor, " B"], view: Int[Tensor, " B"]) -> Int[Tensor, "B 4 H W"]:
        return self._stack(kind, self._all_pictures)[objects.to(self.device), view.to(self.device)]

    def table(self, name: str, objects: Int[Tensor, " B"], view: Int[Tensor, " B"]) -> Float[Tensor, "B ..."]:
        return self._table("render", name)[objects.to(self.device), view.to(self.device)]

    @cached_property
    def _coords(self) -> Ragged:
        return Ragged([torch.from_numpy(a.astype(np.int32)) for a in self._read("voxels", "coords")], self.device)

    @cached_property
    def _features(self) -> Ragged:
        return Ragged([torch.from_numpy(a) for a in self._read("features", "features")], self.device)

    @cached_property
    def _latents(self) -> Ragged:
        return Ragged([torch.from_numpy(a) for a in self._read("latents", "latents")], self.device)

    def _table(self, stage: str, key: str) -> Tensor:
        """A small array of all objects, stacked, cut to the length that all have."""

        def make(key: str) -> Tensor:
            arrays = self._read(stage, key)
            count = min(map(len, arrays))
            return torch.from_numpy(np.stack([a[:count] for a in arrays])).to(self.device)

        return self._stack(key, make)

    def _stack(self, key: str, make: Callable[[str], Tensor]) -> Tensor:
        if key not in self._made:
            self._made[key] = make(key)
        return self._made[key]

    def _read(self, stage: str, key: str) -> list[np.ndarray]:
        try:
            return [self.objects.file(number, stage).read(key) for number in range(len(self))]
        except DamagedFileError as error:
            raise InputError(str(error)) from error

    def _all_pictures(self, kind: str) -> Tensor:
        """[n, V, 4, H, W] uint8 with the views that all have."""
        bounds = self._read("render", f"{kind}_bounds")
        count = min(len(b) for b in bounds) - 1
        if count < 1:
            raise InputError(f"{self.config.data}: no {kind} pictures were rendered")

        def decode(number: int) -> np.ndarray:
            try:
                png = self.objects.file(number, "render").read(f"{kind}_png")
                return np.stack([decode_png(png, bounds[number], v) for v in range(count)])
            except _PICTURE_ERRORS as error:
                raise InputError(f"{self.objects.name(number)}: {error}") from error

        first = decode(0)
        pictures = torch.empty(len(self), *first.shape, dtype=torch.uint8, device=self.device)
        with ThreadPoolExecutor(os.cpu_count()) as pool:  # inflating a PNG releases the interpreter lock
            decoded = pool.map(decode, range(len(self)))
            for number, stack in enumerate(track(decoded, f"{kind} pictures", total=len(self))):
                pictures[number] = torch.from_numpy(stack).to(self.device, non_blocking=True)
        return pictures.permute(0, 1, 4, 2, 3)


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


class StreamedData(SplitData):
    """What a batch needs is read when it is made, into the CPU's memory, and nothing is kept.

    The tensors of an object are compared with their SHA-256 when its file is first used (those of stage ``render`` are
    not: a PNG file has check sums of its own). What cannot be read raises DamagedObjectError.
    """

    def __init__(self, objects: Objects, config: TrainConfig) -> None:
        super().__init__(objects, config)
        self._verified: dict[str, np.ndarray] = {}
        self._counts: dict[str, int] = {}

    def num_voxels(self) -> Int[np.ndarray, " n"]:
        return np.array([self._length(number) for number in range(len(self))])

    def _length(self, number: int) -> int:
        """Of one that cannot be read none: whoever draws it says so."""
        try:
            return self.objects.file(number, "voxels").shape("coords")[0]
        except _PICTURE_ERRORS:
            return 0

    def num_pictures(self, kind: str) -> int:
        count = self._count("render", f"{kind}_bounds") - 1
        if count < 1:
            raise InputError(f"{self.config.data}: no {kind} pictures were rendered")
        return count

    def num_variants(self) -> int:
        return self._count("features", "hue")

    def voxels(self, objects: Int[Tensor, " B"]) -> tuple[Int[Tensor, "N 3"], Int[Tensor, " N"]]:
        coords = self._read("voxels", "coords", objects)
        batch = torch.arange(len(objects)).repeat_interleave(torch.tensor([len(c) for c in coords]))
        return torch.from_numpy(np.concatenate(coords).astype(np.int32)), batch

    def rows(self, stage: str, objects: Int[Tensor, " B"], *place: Int[Tensor, " B"]) -> Float[Tensor, "N C"]:
        found = self._read(stage, stage, objects, *place)
        for number, own in zip(objects.tolist(), found, strict=True):
            voxels = self._of(number, lambda n: self.objects.file(n, "voxels").shape("coords")[0])
            if len(own) != voxels:
                name = self.objects.name(number)
                raise DamagedObjectError(number, f"{name}: {len(own)} rows of {stage} for {voxels} voxels")
        return torch.from_numpy(np.concatenate(found))

    def variants(
        self, objects: Int[Tensor, " B"], variant: Int[Tensor, " B"]
    ) -> tuple[Float[Tensor, " B"], Int[Tensor, " B"]]:
        hue, mirrored = (np.stack(self._read("features", key, objects, variant)) for key in ("hue", "mirrored"))
        return torch.from_numpy(hue), torch.from_numpy(mirrored).long()

    def pictures(self, kind: str, objects: Int[Tensor, " B"], view: Int[Tensor, " B"]) -> Int[Tensor, "B 4 H W"]:
        def decode(number: int, index: int) -> np.ndarray:
            file = self.objects.file(number, "render")
            bounds = file.read_rows(f"{kind}_bounds", index, index + 2)
            return decode_png(file.read_rows(f"{kind}_png", *map(int, bounds)), bounds - bounds[0], 0)

        stack = [self._of(number, decode, index) for number, index in zip(objects.tolist(), view.tolist(), strict=True)]
        return torch.from_numpy(np.stack(stack)).permute(0, 3, 1, 2)

    def table(self, name: str, objects: Int[Tensor, " B"], view: Int[Tensor, " B"]) -> Float[Tensor, "B ..."]:
        return torch.from_numpy(np.stack(self._read("render", name, objects, view)))

    def _read(self, stage: str, key: str, objects: Tensor, *place: Tensor) -> list[np.ndarray]:
        def read(number: int, *index: int) -> np.ndarray:
            file = self.objects.file(number, stage)
            verified = self._verified.setdefault(stage, np.zeros(len(self), bool))
            if stage != "render" and not verified[number]:
                file.verify()
                verified[number] = True
            return file.read(key, *index)

        places = zip(objects.tolist(), *(index.tolist() for index in place), strict=True)
        return [self._of(number, read, *index) for number, *index in places]

    def _of(self, number: int, work: Callable[..., T], *arguments: int) -> T:
        """What ``work`` gives for an object; an error in its data names it."""
        try:
            return work(number, *arguments)
        except _PICTURE_ERRORS as error:
            known = isinstance(error, DamagedFileError)
            raise DamagedObjectError(number, error if known else f"{self.objects.name(number)}: {error}") from error

    def _count(self, stage: str, key: str) -> int:
        """Length of an array, by the first object that can be read: one stage was made with one setting."""
        name = f"{stage} {key}"
        for number in range(len(self)) if name not in self._counts else ():
            try:
                self._counts[name] = self.objects.file(number, stage).shape(key)[0]
                break
            except DamagedFileError:
                continue
        if name not in self._counts:
            raise InputError(f"{self.config.data}: none of {len(self)} objects can be read")
        return self._counts[name]
