"""Textured objects of the project's own making, for examples, tests and users without a data set."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from diff2to3._progress import track
from diff2to3.data._procedural._bake import bake
from diff2to3.data._procedural._families import FAMILIES
from diff2to3.data._procedural._surfaces import Builder
from diff2to3.data._store import Store, write_atomically, write_rows

LICENCE = "CC0-1.0"
_SPLITS = ("train",) * 8 + ("val", "test")


def make_object(family: str, seed: int, number: int) -> Any:
    """Object ``number`` of a seed as a ``trimesh.Trimesh`` (y up); the same arguments give the same object."""
    builder = Builder()
    FAMILIES[family](builder, np.random.default_rng([seed, number]))
    return bake(builder.patches)


def synthesize(out: Path, count: int, seed: int) -> list[dict[str, str]]:
    """Writes ``count`` objects as ``out/<id>.glb`` and their ``out/index.csv`` (id, split, family, licence).

    Families take turns; of every ten rounds of families eight are in split train, one in val and one in test. The
    objects of a smaller count are the first of a larger one, and those that are there already are kept, so a run that
    was stopped goes on where it was. ``out/synthesize/manifest.json`` tells of the last run.
    """
    rows, done = [], {}
    names = list(FAMILIES)
    for number in track(range(count), "synthesize", total=count):
        family = names[number % len(names)]
        row = {
            "id": f"{family}-{seed}-{number:05d}",
            "split": _SPLITS[number // len(names) % len(_SPLITS)],
            "family": family,
            "licence": LICENCE,
        }
        path = out / f"{row['id']}.glb"
        if not path.is_file():
            write_atomically(path, make_object(family, seed, number).export(file_type="glb"))
        rows.append(row)
        done[row["id"]] = sha256(path.read_bytes()).hexdigest()
    write_rows(out / "index.csv", rows)
    Store(out).write_manifest("synthesize", {"count": count, "seed": seed}, done, {})
    return rows
