"""Known data sets: the layout each has once downloaded, its licence and split, and a filter by texture quality.

Layouts are those of the owners' archives and tools: ABO's ``abo-3dmodels.tar``, the repository ``hssd/hssd-models``,
``3D-FUTURE-model.zip``, the folder that the ``objaverse`` package downloads to, and ``toys4k_blend_files.zip`` or
``toys4k_obj_files.zip``. Nothing is downloaded here.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from diff2to3._engines import Workers
from diff2to3._errors import InputError
from diff2to3.data._mesh import MESH_SUFFIXES, Mesh, load_mesh
from diff2to3.data._render_stage import asset_path
from diff2to3.data._run import run_stage
from diff2to3.data._store import Store

TOYS4K_SEED = 4000
TOYS4K_COUNT = 1000  # the paper evaluates on 1,000 assets of Toys4k drawn at random; its list is not published

MINIMUMS = {  # of the texture filter
    "texture_pixels": 256**2,  # of the largest base-colour texture: with fewer a 64^3 grid shows single texels
    "textured_area": 0.5,  # share of the surface: the rest has one flat colour
    "colors": 32,  # distinct ones on the surface at 4 bits a channel: palettes and plain colours stay below
    "color_spread": 8,  # standard deviation of colour on the surface, in steps of 1/255
}
_MAX_METADATA = 1 << 30  # of a metadata file, unpacked; the largest of objaverse has some 50 MB
_SAMPLES = 20_000  # points on the surface
_MESH = "|".join(suffix[1:] for suffix in MESH_SUFFIXES)


@dataclass(frozen=True)
class Dataset:
    """A published data set.

    ``layouts`` are (prefix of the id, pattern of a mesh file's path with the group ``id``); the first that matches a
    path names its asset, and of several files of one asset the one whose layout, then suffix, comes first is taken.
    """

    title: str
    terms: str  # where the owner's terms are accepted
    expected: str  # a path, for messages
    licence: str
    split: str
    layouts: tuple[tuple[str, str], ...]
    hint: str = ""


DATASETS = {
    "abo": Dataset(
        title="Amazon Berkeley Objects",
        terms="https://amazon-berkeley-objects.s3.amazonaws.com/index.html",
        expected="3dmodels/original/<last character>/<id>.glb (abo-3dmodels.tar)",
        licence="CC-BY-4.0",  # archives of before the change of licence carry LICENSE-CC-BY-NC-4.0.txt
        split="train",
        layouts=(("", r"3dmodels/original/[^/]/(?P<id>[^/]+)\.glb"),),
    ),
    "hssd": Dataset(
        title="Habitat Synthetic Scenes Dataset, models",
        terms="https://huggingface.co/datasets/hssd/hssd-models",
        expected="objects/<first character>/<id>.glb",  # not objects/openings, objects/decomposed, <id>.collider.glb
        licence="CC-BY-NC-4.0",
        split="train",
        layouts=(("", r"objects/[0-9a-z]/(?P<id>[0-9a-z]+)\.glb"),),
    ),
    "3d-future": Dataset(
        title="3D-FUTURE",
        terms="https://tianchi.aliyun.com/specials/promotion/alibaba-3d-future",
        expected="3D-FUTURE-model/<id>/raw_model.obj (3D-FUTURE-model.zip)",
        licence="3D-FUTURE terms of use (research, non-commercial)",
        split="train",
        layouts=(("", r"(?P<id>[^/]+)/raw_model\.obj"),),  # normalized_model.obj is the same mesh, scaled
    ),
    "objaverse-xl": Dataset(
        title="Objaverse-XL",
        terms="https://huggingface.co/datasets/allenai/objaverse-xl",
        expected="hf-objaverse-v1/glbs/<n>/<id>.glb, smithsonian/objects/<id>.glb or github/repos/<owner>/<name>/**",
        licence="ODC-By-1.0 for the collection; of this object unknown here",
        split="train",
        layouts=(
            ("sketchfab/", r"hf-objaverse-v1/glbs/[^/]+/(?P<id>[^/]+)\.glb"),
            ("smithsonian/", r"smithsonian/objects/(?P<id>[^/]+)\.glb"),
            ("github/", rf"github/repos/(?P<id>[^/]+/[^/]+/.+\.(?:{_MESH}))"),
        ),
        hint="; unzip github/repos/<owner>/<name>.zip into a folder of that name; Thingiverse's .stl have no texture",
    ),
    "toys4k": Dataset(
        title="Toys4k",
        terms="https://github.com/rehg-lab/lowshot-shapebias/tree/main/toys4k",
        expected="toys4k_blend_files/<category>/<id>/<id>.glb or toys4k_obj_files/<category>/<id>/mesh.obj",
        licence="per object, see the terms of its request form",
        split="test",
        layouts=(
            ("", rf"toys4k_blend_files/[^/]+/(?P<id>[^/]+)/[^/]+\.(?:{_MESH})"),
            ("", rf"toys4k_obj_files/[^/]+/(?P<id>[^/]+)/[^/]+\.(?:{_MESH})"),
        ),
        hint="; export each .blend to a .glb beside it with Blender (docs/data.md says how): the .obj have no textures",
    ),
}


def index_dataset(name: str, folder: Path) -> list[dict[str, str]]:
    """Rows ``{id, split, licence, path}`` of a data set that was downloaded to ``folder``, sorted by id.

    Raises:
        InputError: no file of its layout is there.
    """
    known = DATASETS[name]
    rows = {row["id"]: row for row in _found(known, folder)}
    if not rows:
        raise InputError(
            f"{folder}: no asset of {known.title} found; expected {known.expected}, as downloaded after accepting the"
            f" terms at {known.terms}{known.hint}"
        )
    result = [rows[object_id] for object_id in sorted(rows)]
    if name == "toys4k":
        chosen = frozen_subset(sorted(rows), TOYS4K_COUNT, TOYS4K_SEED)
        result = [row | {"split": "test" if row["id"] in chosen else "rest"} for row in result]
    if name == "objaverse-xl":
        licences = _sketchfab_licences(folder)
        result = [row | {"licence": licences.get(row["id"], row["licence"])} for row in result]
    if name == "abo" and any((folder / up / "LICENSE-CC-BY-NC-4.0.txt").is_file() for up in (".", "3dmodels")):
        result = [row | {"licence": "CC-BY-NC-4.0"} for row in result]
    return result


def frozen_subset(ids: list[str], count: int, seed: int) -> set[str]:
    """``count`` of the ids, the same everywhere: those whose SHA-256 of ``<seed>:<id>`` is smallest.

    An id's place does not depend on the others, so a download that lacks a few assets changes as few of the subset.
    """
    return set(sorted(ids, key=lambda i: hashlib.sha256(f"{seed}:{i}".encode()).hexdigest())[:count])


def _found(known: Dataset, folder: Path) -> Iterator[dict[str, str]]:
    """Rows of the files that match, the preferred file of an asset last."""
    patterns = [(prefix, re.compile(rf"(?:^|.*/){pattern}$", re.IGNORECASE)) for prefix, pattern in known.layouts]
    matches = []
    for parent, folders, names in os.walk(folder):
        folders.sort()
        for file in names:
            path = (Path(parent) / file).relative_to(folder).as_posix()
            for order, (prefix, pattern) in enumerate(patterns):
                if match := pattern.match(path):
                    suffix = MESH_SUFFIXES.index(Path(path).suffix.lower())
                    matches.append((order, suffix, path, prefix + match["id"]))
                    break
    for _, _, path, object_id in sorted(matches, reverse=True):
        yield {"id": object_id, "split": known.split, "licence": known.licence, "path": path}


def _sketchfab_licences(folder: Path) -> dict[str, str]:
    """Licence by row id, from the metadata files that the objaverse package keeps, where they were downloaded."""
    licences = {}
    for file in sorted(folder.glob("**/hf-objaverse-v1/metadata/*.json.gz")):
        with gzip.open(file) as unpacked:
            data = unpacked.read(_MAX_METADATA + 1)
        if len(data) > _MAX_METADATA:
            raise InputError(f"{file} unpacks to more than {_MAX_METADATA:,} bytes; expected the metadata of objaverse")
        for uid, entry in json.loads(data).items():
            short = str(entry.get("license", "")).lower()
            if short:
                licences[f"sketchfab/{uid}"] = f"CC-{short.upper()}-4.0" if short.startswith("by") else short
    return licences


def texture_statistics(mesh: Mesh) -> dict[str, float]:
    """What the texture filter looks at, from points spread evenly over the surface.

    Returns:
        ``texture_pixels`` of the largest base-colour texture, ``textured_area`` (share of the surface whose texture is
        more than one pixel), ``colors`` (distinct ones at 4 bits a channel) and ``color_spread`` (standard deviation
        of colour, 0 to 255).
    """
    rng = np.random.default_rng(0)
    areas = [_areas(part.vertices[part.faces].astype(np.float64)) for part in mesh.parts]
    total = sum(float(a.sum()) for a in areas)
    colors, textured = [], 0.0
    for part, area in zip(mesh.parts, areas, strict=True):
        share = float(area.sum()) / total if total > 0 else 0.0
        count = round(_SAMPLES * share)
        if not count:
            continue
        height, width = part.texture.shape[:2]
        textured += share if height * width > 1 else 0.0
        corners = part.faces[rng.choice(len(area), count, p=area / area.sum())]
        weights = rng.dirichlet(np.ones(3), count)
        uv = np.nan_to_num(np.einsum("nk,nkc->nc", weights, part.uv[corners])) % 1.0
        column = np.minimum((uv[:, 0] * width).astype(int), width - 1)
        row = np.minimum(((1 - uv[:, 1]) * height).astype(int), height - 1)
        tint = np.einsum("nk,nkc->nc", weights, part.colors[corners][..., :3].astype(np.float64)) / 255
        colors.append(part.texture[row, column, :3] * tint)
    seen = np.rint(np.concatenate(colors)) if colors else np.zeros((1, 3))
    steps = (seen / 16).astype(int)
    return {
        "texture_pixels": float(max(part.texture.shape[0] * part.texture.shape[1] for part in mesh.parts)),
        "textured_area": textured,
        "colors": float(len(np.unique(steps @ np.array([256, 16, 1])))),
        "color_spread": float(np.sqrt(seen.var(0).mean())),
    }


def good_texture(statistics: Mapping[str, float | str]) -> bool:
    """The rule of the texture filter: all four minimums are reached. Takes an index row with the columns, too."""
    return all(float(statistics[name]) >= least for name, least in MINIMUMS.items())


def measure_textures(
    folder: Path, store: Store, rows: list[dict[str, str]], workers: int
) -> tuple[list[dict[str, str]], dict[str, str]]:
    """Rows with the texture statistics as columns, and the reason of each asset that cannot be loaded.

    Measured as stage ``textures`` of ``store``, so a run that was stopped goes on where it was.
    """
    paths = {row["id"]: row["path"] for row in rows}
    settings = {"samples": _SAMPLES}
    start = Workers(workers, _start, (str(folder), paths))
    failures = run_stage(store, "textures", list(paths), _measure, settings, start)
    measured = []
    for row in rows:
        if row["id"] not in failures:
            tensors = store.read("textures", row["id"])
            measured.append(row | {name: f"{value.item():.6g}" for name, value in sorted(tensors.items())})
    return measured, failures


_worker: tuple[Path, dict[str, str]] = (Path(), {})  # of a worker process: the data set's folder and files by id


def _start(folder: str, paths: dict[str, str]) -> None:
    global _worker
    _worker = (Path(folder), paths)


def _measure(object_id: str) -> dict[str, np.ndarray]:
    folder, paths = _worker
    statistics = texture_statistics(load_mesh(asset_path(folder, object_id, paths[object_id])))
    return {name: np.array([value], np.float64) for name, value in statistics.items()}


def _areas(triangles: np.ndarray) -> np.ndarray:
    cross = np.cross(triangles[:, 1] - triangles[:, 0], triangles[:, 2] - triangles[:, 0])
    return np.linalg.norm(cross, axis=1) / 2
