"""A data set on disk: one safetensors file an object and stage, a manifest a stage.

``ROOT/objects.csv`` holds the rows of the assets' index, ``ROOT/<stage>/<object id>.safetensors`` the tensors, and
``ROOT/<stage>/manifest.json`` what the last run of the stage did. Every file's header knows the hash of the settings it
was made with and of its own tensors.
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
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from _gs_render_reading import read_json
from PIL import Image

from diff2to3._atomic import writing
from diff2to3._errors import InputError

# whose versions a manifest names, where they are installed: what a stage's tensors can depend on
_TOOLS = (
    "diff2to3",
    "flux-features",
    "sparse-vae",
    "gs-render",
    "torch",
    "numpy",
    "safetensors",
    "pillow",
    "trimesh",
    "moderngl",
    "numba",
    "bpy",
    "ray",
)


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
        try:
            with table.open(newline="", encoding="utf-8") as file:
                rows = list(csv.DictReader(file))
        except (UnicodeDecodeError, csv.Error) as error:
            raise InputError(f"{table} is no CSV table: {error}") from error
        if any(row.get(column) is None for row in rows for column in ("id", "split")):
            raise InputError(f"{table} has a row without id or split; expected both columns in every row")
        return [row for row in rows if split is None or row["split"] == split]

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

    def finished(self, stage: str, settings: Mapping[str, Any], ids: Iterable[str]) -> dict[str, str | None]:
        """Objects whose file of this stage was made with these settings, and the SHA-256 of each one's tensors.

        A stage asks with all of its settings, a later one with those that matter to it. Reads one header an object. The
        hash is None for a file from before hashes were kept.
        """
        digest, asked = settings_hash(settings), json.loads(json.dumps(settings)).items()
        headers = {i: file_metadata(self.path(stage, i)) for i in ids}
        return {
            i: header.get("sha256")
            for i, header in headers.items()
            if (_given(header).items() >= asked if "given" in header else header.get("settings") == digest)
        }

    def settings(self, stage: str, object_id: str) -> dict[str, Any]:
        """What the stage was told when it made an object's file; empty if there is none or it does not say."""
        return _given(file_metadata(self.path(stage, object_id)))

    def write(self, stage: str, object_id: str, tensors: Mapping[str, np.ndarray], settings: Mapping[str, Any]) -> str:
        """Atomic: a killed run leaves either the whole file or none. The same tensors give the same bytes.

        Returns:
            SHA-256 of the tensors: of every byte of the file after its header.
        """
        from safetensors.numpy import save

        plain = memoryview(save({k: np.ascontiguousarray(v) for k, v in tensors.items()}))
        start, digest = _tensors_start(plain), tensors_hash(plain)
        # safetensors writes several metadata in random order, so the header is put together here
        given = json.dumps(settings, sort_keys=True)
        metadata = {"given": given, "settings": settings_hash(settings), "sha256": digest}
        header = json.dumps({"__metadata__": metadata, **json.loads(bytes(plain[8:start]))}, separators=(",", ":"))
        text = header.encode()
        text += b" " * (-len(text) % 8)
        write_atomically(self.path(stage, object_id), len(text).to_bytes(8, "little") + text + plain[start:])
        return digest

    def write_manifest(
        self, stage: str, settings: Mapping[str, Any], done: Mapping[str, str | None], failures: Mapping[str, str]
    ) -> None:
        """What a run did: settings and their hash, counts, failures with reasons, a hash of all outputs, versions.

        Args:
            done: hash of its tensors an object, as :meth:`finished` gives them.
        """
        manifest = {
            "stage": stage,
            "settings": dict(settings),
            "settings_hash": settings_hash(settings),
            "objects": len(done),
            "failed": len(failures),
            "failures": dict(sorted(failures.items())),
            "outputs": {"sha256": outputs_hash(done), "without_hash": sum(value is None for value in done.values())},
            "python": platform.python_version(),
            "platform": platform.platform(),
            "versions": tool_versions(),
        }
        write_atomically(self.root / stage / "manifest.json", json.dumps(manifest, indent=1).encode())

    def manifest(self, stage: str) -> dict[str, Any]:
        """What the last run of a stage did; a manifest of an older version lacks what was not kept then.

        Raises:
            InputError: no run of the stage has ended yet.
        """
        path = self.root / stage / "manifest.json"
        try:
            return dict(read_json(path, most=256 << 20))  # a line for each object that failed
        except (OSError, ValueError) as error:
            raise InputError(
                f"{path}: expected the manifest of a finished run ({error}); run `diff2to3 data` for stage {stage!r}"
            ) from error


def outputs_hash(done: Mapping[str, str | None]) -> str:
    """SHA-256 of the lines ``<SHA-256 of an object's tensors>  <object id>``, sorted by id."""
    return sha256("".join(f"{done[i] or '-'}  {i}\n" for i in sorted(done)).encode()).hexdigest()


def tool_versions() -> dict[str, str]:
    """Installed version by distribution, of those that a stage's tensors can depend on; imports none of them."""
    found = {}
    for name in _TOOLS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _given(header: Mapping[str, str]) -> dict[str, Any]:
    """A stage's settings from a file's metadata; empty for a file from before they were kept."""
    try:
        return dict(json.loads(header.get("given", "{}")))
    except (ValueError, TypeError, RecursionError):  # damaged: as if it did not say
        return {}


def tensors_hash(payload: bytes | memoryview) -> str:
    """SHA-256 of the tensors of a safetensors file, that is of every byte after its header."""
    return sha256(memoryview(payload)[_tensors_start(payload) :]).hexdigest()


def _tensors_start(payload: bytes | memoryview) -> int:
    return 8 + int.from_bytes(payload[:8], "little")


def write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    """Writes rows as CSV, whole or not at all; a column that only some rows have is empty in the others."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, fieldnames=list(dict.fromkeys(column for row in rows for column in row)))
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, buffer.getvalue().encode())


def write_atomically(path: Path, payload: bytes) -> None:
    """Writes a whole file or nothing; makes its folder.

    Raises:
        OutputError: the file system does not let it.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.unlink(missing_ok=True)  # a link there would lead elsewhere
            with temporary.open("xb") as file:
                file.write(payload)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def settings_hash(settings: Mapping[str, Any]) -> str:
    """16 hexadecimal digits that change with the settings."""
    return sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def file_metadata(path: Path) -> dict[str, str]:
    """What a safetensors header says about the file; empty for a missing or broken file."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(min(length, 100_000_000)))  # the format allows no longer one
    except (OSError, ValueError, RecursionError):
        return {}
    stated = header.get("__metadata__") if isinstance(header, dict) else None
    return {str(k): str(v) for k, v in stated.items()} if isinstance(stated, dict) else {}


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
