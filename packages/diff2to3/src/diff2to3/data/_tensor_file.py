"""A safetensors file, also one inside a tar, read in parts: one tensor, or one entry of its first axes.

The safetensors library reads a file of its own or all bytes of one in memory; a batch needs a few kB of the 10 MB that
an object may have. Format: https://github.com/huggingface/safetensors.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from diff2to3.data._store import tensors_hash

_TYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "U8": "u1", "I8": "i1"}


class DamagedFileError(ValueError):
    """A file of a data set is missing, cut off or altered; the message says which and how."""


class _Entry(NamedTuple):
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    start: int  # in the file, not after the header as in the format


@dataclass(frozen=True)
class TensorFile:
    """``size`` bytes of ``path`` from ``start``. Every method raises DamagedFileError when they cannot be read."""

    path: Path
    start: int
    size: int

    @classmethod
    def whole(cls, path: Path) -> TensorFile:
        """The file at a path."""
        try:
            return cls(path, 0, path.stat().st_size)
        except OSError as error:
            raise DamagedFileError(f"{path}: {error.strerror}") from error

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return self._entry(key).shape

    def read(self, key: str, *place: int) -> np.ndarray:
        """A tensor, or what it holds at a place of its first axes."""
        entry = self._entry(key)
        if len(place) > len(entry.shape) or not all(0 <= i < n for i, n in zip(place, entry.shape, strict=False)):
            raise self._damaged(f"{key} has shape {list(entry.shape)} and nothing at {list(place)}")
        shape = entry.shape[len(place) :]
        skipped = int(np.ravel_multi_index(place, entry.shape[: len(place)])) * prod(shape) if place else 0
        return self._array(entry, skipped, shape)

    def read_rows(self, key: str, first: int, last: int) -> np.ndarray:
        """Rows ``first`` to before ``last`` of a tensor."""
        entry = self._entry(key)
        if not entry.shape or not 0 <= first <= last <= entry.shape[0]:
            raise self._damaged(f"{key} has shape {list(entry.shape)} and no rows {first} to {last}")
        row = entry.shape[1:]
        return self._array(entry, first * prod(row), (last - first, *row))

    def verify(self) -> None:
        """Compares the tensors with the SHA-256 that the stage wrote into the header, if it did."""
        metadata = self._header.get("__metadata__")
        expected = metadata.get("sha256") if isinstance(metadata, dict) else None
        if expected and tensors_hash(memoryview(self._bytes(0, self.size))) != expected:
            raise self._damaged("its tensors have another SHA-256 than its header says")

    @cached_property
    def _header(self) -> dict[str, Any]:
        length = int.from_bytes(self._bytes(0, 8), "little")
        text = self._bytes(8, length)
        try:
            header = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise self._damaged("its header is no JSON") from error
        if not isinstance(header, dict):
            raise self._damaged("its header is no JSON object")
        return {"__length__": 8 + length, **header}

    def _entry(self, key: str) -> _Entry:
        header = self._header
        try:
            stated = header[key]
            dtype, (first, last) = np.dtype(_TYPES[stated["dtype"]]), map(int, stated["data_offsets"])
            shape = tuple(map(int, stated["shape"]))
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise self._damaged(f"it has no usable tensor {key!r}") from error
        if min((*shape, first), default=0) < 0 or last - first != prod(shape) * dtype.itemsize:
            raise self._damaged(f"its header contradicts itself about {key!r}")
        return _Entry(dtype, shape, header["__length__"] + first)

    def _array(self, entry: _Entry, skipped: int, shape: tuple[int, ...]) -> np.ndarray:
        itemsize = entry.dtype.itemsize
        payload = self._bytes(entry.start + skipped * itemsize, prod(shape) * itemsize)
        return np.frombuffer(payload, entry.dtype).reshape(shape)

    def _bytes(self, offset: int, count: int) -> bytearray:
        if offset + count > self.size:
            raise self._damaged(f"it ends at byte {self.size}, before {offset + count}")
        payload = bytearray(count)
        try:
            with self.path.open("rb") as file:
                file.seek(self.start + offset)
                found = file.readinto(payload)
        except OSError as error:
            raise self._damaged(str(error.strerror)) from error
        if found != count:
            raise self._damaged("the file was cut off")
        return payload

    def _damaged(self, reason: str) -> DamagedFileError:
        where = f"{self.path}, the file at byte {self.start}" if self.start else str(self.path)
        return DamagedFileError(f"{where}: {reason}")
