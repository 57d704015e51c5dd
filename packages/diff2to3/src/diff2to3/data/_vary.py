"""More shapes to learn from: objects of a data set stretched along their axes, as assets of their own."""

from __future__ import annotations

import json
import struct
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from diff2to3._progress import track
from diff2to3.data._limits import RefusedAsset, glb_chunks
from diff2to3.data._render_stage import asset_path
from diff2to3.data._store import Store, write_atomically, write_rows


def vary(
    source: Path, out: Path, rows: list[dict[str, str]], *, copies: int, stretch: float, seed: int, split: str = "train"
) -> tuple[list[dict[str, str]], dict[str, str]]:
    """Writes every asset of `rows` and `copies` stretched ones of each in `split` under `out`, with their index.csv.

    A copy of object ``x`` is ``x-stretched-1`` and so on, with a column ``stretched_from``; it depends on the object's
    id, its number and the seed alone. What is there already is kept. ``out/vary/manifest.json`` tells of the last run.

    Args:
        source: folder of the assets.
        out: folder to write.
        rows: of the assets, with ``id`` and ``split``.
        copies: of each object.
        stretch: each axis is scaled by a factor between 1 / (1 + stretch) and 1 + stretch, evenly in its logarithm.
        seed: of the factors.
        split: whose objects are stretched: those that are learned from.

    Returns:
        The rows written, and why others were not, by id.
    """
    kept, done, failures = [], {}, {}
    for row in track(rows, "vary", total=len(rows)):
        try:
            path = asset_path(source, row["id"], row.get("path") or None)
            data = path.read_bytes()
            made = {row["id"]: (data, path.suffix)}
            for number in range(1, copies + 1 if row["split"] == split else 1):
                name = f"{row['id']}-stretched-{number}"
                made[name] = stretched(data, _factors(name, stretch, seed)), path.suffix
        except (OSError, ValueError, RefusedAsset) as error:
            failures[row["id"]] = " ".join(str(error).split())
            continue
        for name, (content, suffix) in made.items():
            target = out / "objects" / f"{name}{suffix}"
            if not target.is_file():
                write_atomically(target, content)
            origin = {"stretched_from": row["id"] if name != row["id"] else ""}
            kept.append({k: v for k, v in row.items() if k != "path"} | {"id": name} | origin)
            done[name] = sha256(content).hexdigest()
    if kept:
        write_rows(out / "index.csv", kept)
        settings = {"copies": copies, "stretch": stretch, "seed": seed, "split": split}
        Store(out).write_manifest("vary", settings, done, failures)
    return kept, failures


def stretched(glb: bytes, factors: tuple[float, float, float]) -> bytes:
    """A binary glTF file whose scenes are scaled along x, y and z; buffers and textures stay the bytes that they are.

    Raises:
        RefusedAsset: not a binary glTF 2.0 file.
    """
    tree, _ = glb_chunks(glb)
    nodes: list[dict[str, Any]] = tree.setdefault("nodes", [])
    for scene in tree.get("scenes", []):
        nodes.append({"name": "stretched", "scale": list(factors), "children": scene.get("nodes", [])})
        scene["nodes"] = [len(nodes) - 1]
    text = json.dumps(tree, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 4)
    [length] = struct.unpack("<I", glb[12:16])
    chunks = struct.pack("<I4s", len(text), b"JSON") + text + glb[20 + length :]
    return struct.pack("<4sII", b"glTF", 2, 12 + len(chunks)) + chunks


def _factors(name: str, stretch: float, seed: int) -> tuple[float, float, float]:
    digest = sha256(f"{seed} {name}".encode()).digest()
    x, y, z = np.exp(np.log1p(stretch) * np.random.default_rng(list(digest)).uniform(-1, 1, 3)).round(6)
    return float(x), float(y), float(z)
