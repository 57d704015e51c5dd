"""A data set as WebDataset shards: tar files of a few hundred MB that a training run streams.

``OUT/<split>-000000.tar`` holds whole objects, each as ``<key>.json`` (its row of ``objects.csv``) and one
``<key>.<stage>.safetensors`` a stage, byte for byte as the stage wrote it. ``OUT/index.json`` has counts and SHA-256 of
every shard, and why an object is in none. Format: https://github.com/webdataset/webdataset.
"""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import file_digest, sha256
from io import BytesIO
from pathlib import Path
from typing import Any

from _gs_render_reading import read_json

from diff2to3._errors import InputError
from diff2to3._progress import track
from diff2to3.data._store import Store, file_metadata, settings_hash, tensors_hash, tool_versions, write_atomically

INDEX = "index.json"
MAX_INDEX_BYTES = 256 << 20  # with a reason for each of a million objects that are left out
STAGES = ("render", "voxels", "features", "latents")
_BLOCK = tarfile.BLOCKSIZE


@dataclass(frozen=True)
class _Sample:
    """An object with a file of every stage; ``identity`` changes when what the shard holds of it does."""

    row: dict[str, str]
    files: dict[str, Path]
    size: int  # bytes in a tar
    identity: str


@dataclass(frozen=True)
class _Shard:
    """A shard to be; ``plan`` is a hash of what it will hold."""

    name: str
    split: str
    samples: list[_Sample]

    @property
    def plan(self) -> str:
        return sha256("\n".join(sample.identity for sample in self.samples).encode()).hexdigest()


def pack(store: Store, out: Path, stages: tuple[str, ...], shard_bytes: int) -> dict[str, Any]:
    """Writes the objects that have all stages as shards of at most ``shard_bytes`` (one object at least) a split.

    The order is random but fixed: by the SHA-256 of the id. A shard is whole or not there; one that the index lists
    with the same contents is left alone, so a run that was stopped goes on where it was and a finished one does
    nothing. Equal inputs give equal bytes. Shards of an earlier run that are no longer wanted are removed.

    Args:
        stages: in any order; empty: those of render, voxels, features, latents whose run has ended.

    Returns:
        The index, as it stands in ``out/index.json``.

    Raises:
        InputError: no object has all stages, a stage has no manifest, or a file is damaged.
    """
    stages = stages or tuple(s for s in STAGES if (store.root / s / "manifest.json").is_file())
    rows = store.objects()
    if not stages:
        raise InputError(f"{store.root}: no stage is finished; run `diff2to3 data render` and the others first")
    settings = {stage: store.manifest(stage)["settings"] for stage in stages}
    samples, skipped = _collect(store, rows, settings)
    if not samples:
        reasons = ", ".join(sorted(set(skipped.values()))) or "objects.csv is empty"
        raise InputError(f"{store.root}: no object has all of {', '.join(stages)} ({reasons})")
    shards = list(_plan(samples, shard_bytes))
    before = _entries(out)
    index: dict[str, Any] = {
        "format": "webdataset",
        "stages": {s: {"settings": settings[s], "settings_hash": settings_hash(settings[s])} for s in stages},
        "versions": tool_versions(),
        "complete": False,
        "objects": len(samples),
        "skipped": skipped,
        "shards": [],
    }
    for name in before.keys() - {shard.name for shard in shards}:
        (out / name).unlink(missing_ok=True)
    done = {s.name: before[s.name] for s in shards if _is_there(out / s.name, before.get(s.name), s.plan)}
    for shard in track([s for s in shards if s.name not in done], "pack", total=len(shards) - len(done)):
        done[shard.name] = _write_shard(out / shard.name, shard)
        _write_index(out, index | {"shards": [done[name] for name in sorted(done)]})
    index |= {"complete": True, "shards": [done[s.name] for s in shards]}
    _write_index(out, index)
    sums = "".join(f"{entry['sha256']}  {entry['name']}\n" for entry in index["shards"])
    write_atomically(out / "SHA256SUMS", sums.encode())
    return index


def _collect(
    store: Store, rows: list[dict[str, str]], settings: dict[str, Any]
) -> tuple[list[_Sample], dict[str, str]]:
    """Objects with a file of every stage, made with the stage's settings; reason by object for the others."""
    wanted = {stage: settings_hash(value) for stage, value in settings.items()}
    samples, skipped = [], {}
    for row in track(rows, "list", total=len(rows)):
        files = {stage: store.path(stage, row["id"]) for stage in wanted}
        headers = {stage: file_metadata(path) for stage, path in files.items()}
        lacking = [stage for stage, path in files.items() if not path.is_file()]
        stale = [stage for stage in files if headers[stage].get("settings") != wanted[stage]]
        if lacking or stale:
            skipped[row["id"]] = (
                f"lacks {', '.join(lacking)}" if lacking else f"other settings than the last run's: {', '.join(stale)}"
            )
            continue
        stats = {stage: path.stat() for stage, path in files.items()}
        content = {  # a file from before hashes were kept is known by size and time
            stage: headers[stage].get("sha256") or [stats[stage].st_size, stats[stage].st_mtime_ns] for stage in files
        }
        size = sum(_in_tar(stat.st_size) for stat in stats.values()) + _in_tar(len(_row_json(row)))
        samples.append(_Sample(row, files, size, json.dumps([row, content, wanted], sort_keys=True)))
    return samples, skipped


def _plan(samples: list[_Sample], shard_bytes: int) -> Iterator[_Shard]:
    by_split: dict[str, list[_Sample]] = {}
    for sample in sorted(samples, key=lambda s: shard_order(s.row["id"])):
        by_split.setdefault(sample.row["split"], []).append(sample)
    for split, members in sorted(by_split.items()):
        if not re.fullmatch(r"[\w-]+", split):
            raise InputError(f"split {split!r} cannot begin a file name; expected letters, digits, _ and - only")
        number, size = 0, 0
        chosen: list[_Sample] = []
        for sample in members:
            if chosen and size + sample.size > shard_bytes:
                yield _Shard(f"{split}-{number:06d}.tar", split, chosen)
                number, chosen, size = number + 1, [], 0
            chosen.append(sample)
            size += sample.size
        yield _Shard(f"{split}-{number:06d}.tar", split, chosen)


def _entries(out: Path) -> dict[str, dict[str, Any]]:
    """Shards by name in the index of an earlier run, whether it ended or not."""
    try:
        entries = read_json(out / INDEX, MAX_INDEX_BYTES)["shards"]
        return {entry["name"]: entry for entry in entries if Path(entry["name"]).name == entry["name"]}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{out / INDEX} is not an index of shards ({error!r}); choose another folder") from error


def _is_there(path: Path, entry: dict[str, Any] | None, plan: str) -> bool:
    return entry is not None and entry["plan"] == plan and path.is_file() and path.stat().st_size == entry["bytes"]


def _write_shard(path: Path, shard: _Shard) -> dict[str, Any]:
    """The shard and its entry in the index."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")  # one name: what a killed run left is removed by the next
    try:
        temporary.unlink(missing_ok=True)  # also a link, which would lead elsewhere
        with temporary.open("xb") as file, tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
            for sample in shard.samples:
                key = sample_key(sample.row["id"])
                _add(tar, f"{key}.json", _row_json(sample.row))
                for stage, source in sample.files.items():
                    _add(tar, f"{key}.{stage}.safetensors", _checked(source))
        with temporary.open("rb") as written:
            digest = file_digest(written, "sha256")
        entry = {
            "name": path.name,
            "split": shard.split,
            "objects": len(shard.samples),
            "bytes": temporary.stat().st_size,
            "sha256": digest.hexdigest(),
            "plan": shard.plan,
        }
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return entry


def _checked(path: Path) -> bytes:
    """The bytes of a stage's file.

    Raises:
        InputError: they are not those that the stage wrote.
    """
    payload = path.read_bytes()
    expected = file_metadata(path).get("sha256")
    if expected and tensors_hash(payload) != expected:
        raise InputError(f"{path} is damaged: its tensors have another SHA-256; delete it and run its stage again")
    return payload


def _add(tar: tarfile.TarFile, name: str, payload: bytes) -> None:
    """A member without time, owner or anything else that differs between two runs."""
    member = tarfile.TarInfo(name)
    member.size = len(payload)
    tar.addfile(member, BytesIO(payload))


def _in_tar(size: int) -> int:
    return _BLOCK + -(-size // _BLOCK) * _BLOCK


def shard_order(object_id: str) -> bytes:
    """What objects are sorted by in shards: random, but fixed by the id."""
    return sha256(object_id.encode()).digest()


def sample_key(object_id: str) -> str:
    """The name of an object in a shard: WebDataset ends a key at the first dot, so a dot becomes ``%2E``."""
    return object_id.replace("/", "__").replace("%", "%25").replace(".", "%2E")


def _row_json(row: dict[str, str]) -> bytes:
    return json.dumps(row, sort_keys=True).encode()


def _write_index(out: Path, index: dict[str, Any]) -> None:
    write_atomically(out / INDEX, json.dumps(index, indent=1).encode())
