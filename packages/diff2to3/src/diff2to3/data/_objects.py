"""The objects of one split of a data set by number, wherever their files are: a folder, or shards.

The order is that of the shards, random but fixed, so that both give the same objects in the same order.
"""

from __future__ import annotations

import re
import tarfile
from functools import cache
from itertools import accumulate
from pathlib import Path
from threading import Lock
from typing import Any, Protocol

import numpy as np
from _gs_render_reading import read_json

from diff2to3._errors import InputError
from diff2to3.data._shards import INDEX, MAX_INDEX_BYTES, shard_order
from diff2to3.data._store import Store
from diff2to3.data._tensor_file import DamagedFileError, TensorFile

_COUNTS = ("objects", "bytes")


class Objects(Protocol):
    """Some objects of a data set that have files of some stages."""

    def __len__(self) -> int: ...

    def name(self, number: int) -> str:
        """What to call an object in a message."""
        ...

    def file(self, number: int, stage: str) -> TensorFile:
        """The file of an object in a stage; DamagedFileError if it cannot be found."""
        ...


def is_packed(root: Path) -> bool:
    """Whether a folder holds shards, not a data set's own files."""
    return (root / INDEX).is_file()


def open_objects(root: Path, split: str, stages: tuple[str, ...], limit: int | None = None) -> Objects:
    """The objects of a split that have all stages.

    Args:
        root: a data set folder, or the folder of its shards.
        split: name of the split.
        stages: whose files are needed.
        limit: only the first ones in the order of the shards.

    Raises:
        LookupError: there are none.
        InputError: neither a data set nor shards, or shards that are damaged or lack a stage.
    """
    objects = ShardObjects(root, split, stages, limit) if is_packed(root) else FolderObjects(root, split, stages, limit)
    if not len(objects):
        raise LookupError(f"{root}: split {split!r} has no object with all of the stages {', '.join(stages)}")
    return objects


class FolderObjects:
    """Objects whose files lie in the folders of their stages."""

    def __init__(self, root: Path, split: str, stages: tuple[str, ...], limit: int | None) -> None:
        self.store = Store(root)
        ids = [row["id"] for row in self.store.objects(split)]
        there = [i for i in ids if all(self.store.path(stage, i).is_file() for stage in stages)]
        self.ids = sorted(there, key=shard_order)[:limit]

    def __len__(self) -> int:
        return len(self.ids)

    def name(self, number: int) -> str:
        return self.ids[number]

    def file(self, number: int, stage: str) -> TensorFile:
        return TensorFile.whole(self.store.path(stage, self.ids[number]))


class ShardObjects:
    """Objects in the shards of ``diff2to3 data pack``. A shard's members are listed when it is first needed."""

    def __init__(self, root: Path, split: str, stages: tuple[str, ...], limit: int | None) -> None:
        index = _read_index(root)
        if lacking := [stage for stage in stages if stage not in index["stages"]]:
            raise InputError(
                f"{root}: the shards have no stage {', '.join(lacking)}, only {', '.join(index['stages'])}; "
                "pack the data set with all of them"
            )
        entries = [entry for entry in index["shards"] if entry["split"] == split]
        _check_files(root, entries)
        self.stages = stages
        self.paths = [root / entry["name"] for entry in entries]
        self.ends = list(accumulate(entry["objects"] for entry in entries))
        total = self.ends[-1] if self.ends else 0
        self.count = total if limit is None else min(limit, total)
        self.lock = Lock()
        self.members = cache(self._members)

    def __len__(self) -> int:
        return self.count

    def name(self, number: int) -> str:
        shard, place = self._place(number)
        return f"object {place} of {self.paths[shard].name}"

    def file(self, number: int, stage: str) -> TensorFile:
        shard, place = self._place(number)
        with self.lock:
            members = self.members(shard)
        if place >= len(members):
            raise DamagedFileError(f"{self.paths[shard]}: only {len(members)} of its objects can be found")
        start, size = map(int, members[place][self.stages.index(stage)])
        if size == 0:
            raise DamagedFileError(f"{self.paths[shard]}: object {place} has no file of stage {stage!r}")
        return TensorFile(self.paths[shard], start, size)

    def _place(self, number: int) -> tuple[int, int]:
        shard = int(np.searchsorted(self.ends, number, side="right"))
        return shard, number - (self.ends[shard - 1] if shard else 0)

    def _members(self, shard: int) -> np.ndarray:
        """First byte and size [objects, stages, 2] of the files in a shard; zeros for what is not there."""
        found: dict[str, dict[str, tuple[int, int]]] = {}
        try:
            with tarfile.open(self.paths[shard], "r:") as tar:
                for member in tar:
                    key, _, rest = member.name.partition(".")
                    found.setdefault(key, {})[rest] = (member.offset_data, member.size)
        except (OSError, tarfile.TarError):
            pass  # what comes before the damage can be used; what is missing is said when it is asked for
        names = [f"{stage}.safetensors" for stage in self.stages]
        places = [[files.get(name, (0, 0)) for name in names] for files in found.values()]
        return np.array(places, np.int64).reshape(len(found), len(names), 2)


def _read_index(root: Path) -> dict[str, Any]:
    try:
        index = read_json(root / INDEX, MAX_INDEX_BYTES)
        if not all(type(entry[key]) is int and entry[key] >= 0 for entry in index["shards"] for key in _COUNTS):
            raise ValueError("a count is no whole number")
        [entry["split"] for entry in index["shards"]], dict(index["stages"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{root / INDEX} is not an index of shards ({error!r}); pack the data set again") from error
    if foreign := [name for entry in index["shards"] if not re.fullmatch(r"[\w-]+\.tar", name := str(entry["name"]))]:
        raise InputError(f"{root / INDEX} names {foreign[0][:100]!r}, which is no shard in its folder")
    if not index.get("complete"):
        raise InputError(f"{root}: packing has not ended; run `diff2to3 data pack` again")
    return dict(index)


def _check_files(root: Path, entries: list[dict[str, Any]]) -> None:
    """Raises InputError for shards that are missing or have another size than the index says."""
    wrong = []
    for entry in entries:
        path = root / entry["name"]
        if not path.is_file():
            wrong.append(f"{entry['name']} is missing")
        elif (size := path.stat().st_size) != entry["bytes"]:
            wrong.append(f"{entry['name']} has {size} bytes, expected {entry['bytes']}")
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise InputError(
            f"{root}: {len(wrong)} of {len(entries)} shards are damaged: {'; '.join(wrong[:3])}{more}; copy them "
            "again, or run `diff2to3 data pack` again (`sha256sum -c SHA256SUMS` checks all of them)"
        )
