"""A data set on disk: one safetensors file an object and stage, a manifest a stage.

``ROOT/objects.csv`` (the rows of the assets' index), ``ROOT/<stage>/<object id>.safetensors``, ``ROOT/<stage>/manifest.json``.
"""

from __future__ import annotations

import csv
import io
import json
import os
import platform
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from hashlib import sha256
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from diff2to3._progress import track


@dataclass(frozen=True)
class Store:
    """A data set folder."""

    root: Path

    def path(self, stage: str, object_id: str) -> Path:
        return self.root / stage / f"{object_id.replace('/', '__')}.safetensors"

    def objects(self, split: str | None = None) -> list[dict[str, str]]:
        """Rows of ``objects.csv``, those of one split if given."""
        table = self.root / "objects.csv"
        if not table.is_file():
            raise ValueError(
                f"{self.root} is not a data set: {table.name} is missing; start with `diff2to3 data render`"
            )
        with table.open(newline="") as file:
            return [row for row in csv.DictReader(file) if split is None or row["split"] == split]

    def read(self, stage: str, object_id: str) -> dict[str, np.ndarray]:
        from safetensors.numpy import load_file

        return load_file(self.path(stage, object_id))

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
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(payload)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def settings_hash(settings: Mapping[str, Any]) -> str:
    return sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def _digest_of(path: Path) -> str | None:
    """The settings hash in a safetensors header, None for a missing or broken file."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            return json.loads(file.read(length)).get("__metadata__", {}).get("settings")
    except (OSError, ValueError):
        return None


def run_stage(
    store: Store,
    stage: str,
    ids: list[str],
    work: Callable[[str], Mapping[str, np.ndarray]],
    settings: Mapping[str, Any],
    *,
    workers: int = 0,
    initializer: Callable[..., None] | None = None,
    initargs: tuple = (),
) -> dict[str, str]:
    """Runs ``work(object id) -> tensors`` for every object that lacks this stage; a failing object is recorded, not fatal.

    Args:
        workers: processes; 0 runs in this one (for work on a GPU).

    Returns:
        Reason per failed object; it also stands in the stage's manifest.
    """
    ready = store.finished(stage, settings, ids)
    todo = [i for i in ids if i not in ready]
    failures: dict[str, str] = {}

    def finish(object_id: str, outcome: Callable[[], Mapping[str, np.ndarray]]) -> None:
        try:
            store.write(stage, object_id, outcome(), settings)
        except (ValueError, RuntimeError, BrokenProcessPool) as error:
            failures[object_id] = f"{type(error).__name__}: {error}"

    if workers:
        context = get_context("spawn")  # forking a process that holds OpenGL or CUDA state is not safe
        with ProcessPoolExecutor(workers, mp_context=context, initializer=initializer, initargs=initargs) as pool:
            futures: dict[Future, str] = {pool.submit(work, object_id): object_id for object_id in todo}
            for future in track(as_completed(futures), stage, total=len(todo)):
                finish(futures.pop(future), future.result)
    else:
        if initializer is not None:
            initializer(*initargs)
        for object_id in track(todo, stage, total=len(todo)):
            finish(object_id, lambda object_id=object_id: work(object_id))
    store.write_manifest(stage, settings, len(ids) - len(failures), failures)
    return failures


def encode_pngs(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """uint8 ``[V, H, W, C]`` -> all PNG files in a row, uint8 ``[bytes]``, and their bounds, int64 ``[V + 1]``."""
    files = []
    for image in images:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "PNG", compress_level=1)
        files.append(buffer.getvalue())
    bounds = np.cumsum([0, *map(len, files)])
    return np.frombuffer(b"".join(files), np.uint8), bounds.astype(np.int64)


def decode_png(data: np.ndarray, bounds: np.ndarray, index: int) -> np.ndarray:
    """Picture ``index`` of :func:`encode_pngs`, uint8 ``[H, W, C]``."""
    with Image.open(io.BytesIO(data[bounds[index] : bounds[index + 1]].tobytes())) as image:
        return np.asarray(image)
