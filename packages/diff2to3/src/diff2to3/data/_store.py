"""A data set on disk: one safetensors file an object and stage, a manifest a stage.

``ROOT/objects.csv`` holds the rows of the assets' index, ``ROOT/<stage>/<object id>.safetensors`` the tensors, and
``ROOT/<stage>/manifest.json`` what the last run of the stage did.
"""

from __future__ import annotations

import csv
import io
import json
import os
import platform
import struct
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from diff2to3._errors import InputError


@dataclass(frozen=True)
class Store:
    """A data set folder."""

    root: Path

    def path(self, stage: str, object_id: str) -> Path:
        """The file of an object in a stage, whether it is there or not."""
        return self.root / stage / f"{object_id.replace('/', '__')}.safetensors"

    def objects(self, split: str | None = None) -> list[dict[str, str]]:
        """Rows of ``objects.csv``, those of one split if given."""
        table = self.root / "objects.csv"
        if not table.is_file():
            raise InputError(
                f"{self.root} is not a data set: {table.name} is missing; start with `diff2to3 data render`"
            )
        with table.open(newline="") as file:
            return [row for row in csv.DictReader(file) if split is None or row["split"] == split]

    def read(self, stage: str, object_id: str) -> dict[str, np.ndarray]:
        """The tensors of an object.

        Raises:
            ValueError: the stage has no (whole) file of this object.
        """
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        path = self.path(stage, object_id)
        try:
            return load_file(path)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path} cannot be read ({error}); run `diff2to3 data` for stage {stage!r}") from error

    def finished(self, stage: str, settings: Mapping[str, Any], ids: Iterable[str]) -> set[str]:
        """Objects whose file of this stage was made with the same settings."""
        digest = settings_hash(settings)
        return {i for i in ids if _digest_of(self.path(stage, i)) == digest}

    def write(self, stage: str, object_id: str, tensors: Mapping[str, np.ndarray], settings: Mapping[str, Any]) -> None:
        """Atomic: a killed run leaves either the whole file or none."""
        from safetensors.numpy import save

        payload = save({k: np.ascontiguousarray(v) for k, v in tensors.items()}, {"settings": settings_hash(settings)})
        write_atomically(self.path(stage, object_id), payload)

    def write_manifest(self, stage: str, settings: Mapping[str, Any], done: int, failures: Mapping[str, str]) -> None:
        manifest = {
            "stage": stage,
            "settings": dict(settings),
            "objects": done,
            "failures": dict(sorted(failures.items())),
            "python": platform.python_version(),
        }
        write_atomically(self.root / stage / "manifest.json", json.dumps(manifest, indent=1).encode())


def write_atomically(path: Path, payload: bytes) -> None:
    """Writes a whole file or nothing; makes its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(payload)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def settings_hash(settings: Mapping[str, Any]) -> str:
    """16 hexadecimal digits that change with the settings."""
    return sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def _digest_of(path: Path) -> str | None:
    """The settings hash in a safetensors header, None for a missing or broken file."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            return json.loads(file.read(length)).get("__metadata__", {}).get("settings")
    except (OSError, ValueError):
        return None


def encode_pngs(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """uint8 ``[V, H, W, 3 or 4]`` -> all PNG files in a row, uint8 ``[bytes]``, and their bounds, int64 ``[V + 1]``."""
    files = [_png(image) for image in images]
    bounds = np.cumsum([0, *map(len, files)])
    return np.frombuffer(b"".join(files), np.uint8), bounds.astype(np.int64)


def _png(image: np.ndarray) -> bytes:
    """A PNG file whose rows all have the filter "up": renders compress well so, in half the time that Pillow takes."""
    height, width, channels = image.shape
    rows = np.empty((height, 1 + width * channels), np.uint8)
    rows[:, 0] = 2
    pixels = image.reshape(height, -1)
    rows[0, 1:] = pixels[0]
    np.subtract(pixels[1:], pixels[:-1], out=rows[1:, 1:])
    deflate = zlib.compressobj(1, strategy=zlib.Z_RLE)
    header = struct.pack(">IIBBBBB", width, height, 8, {3: 2, 4: 6}[channels], 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", deflate.compress(rows.data) + deflate.flush()), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )


def decode_png(data: np.ndarray, bounds: np.ndarray, index: int) -> np.ndarray:
    """Picture ``index`` of :func:`encode_pngs`, uint8 ``[H, W, C]``."""
    with Image.open(io.BytesIO(data[bounds[index] : bounds[index + 1]].tobytes())) as image:
        return np.asarray(image)
