"""Stages ``render`` and ``voxelize``: assets in, pictures with cameras and surface voxels out."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, field_validator

from diff2to3._engines import Workers
from diff2to3._errors import InputError
from diff2to3._image import object_crop
from diff2to3._plugins import MESH_RENDERER, MeshRenderer, build
from diff2to3.data._mesh import MESH_SUFFIXES, Mesh, load_mesh
from diff2to3.data._renderers import AUTO, choose_renderer
from diff2to3.data._run import run_stage
from diff2to3.data._store import Store, encode_pngs, write_rows
from diff2to3.data._views import condition_views, random_views, sphere_views
from diff2to3.data._voxelize import Rule, voxelize


class RenderSettings(BaseModel):
    """Views rendered of every object, and by what.

    Args:
        condition_fov: least and largest field of view of a condition view, degrees.
        renderer: component of the role ``mesh_renderer``, with its config in ``renderer_config`` (empty: its defaults).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    size: int = Field(default=256, ge=32, multiple_of=32)
    num_views: int = Field(default=32, ge=1)
    num_extra_views: int = Field(default=8, ge=0)
    num_condition_views: int = Field(default=12, ge=0)
    condition_fov: tuple[float, float] = (20.0, 60.0)
    seed: int = 0
    renderer: str = "cpu"
    renderer_config: dict[str, Any] = Field(default_factory=dict)

    @field_validator("condition_fov")
    @classmethod
    def _in_order(cls, fov: tuple[float, float]) -> tuple[float, float]:
        if not 1 <= fov[0] <= fov[1] <= 120:
            raise ValueError("expected two angles, the smaller first, from 1 to 120 degrees")
        return fov

    @property
    def condition_frame(self) -> int:
        """Side in pixels of the pictures that the condition views' crops are cut from: an object fills two thirds."""
        return self.size * 3 // 2


def list_assets(source: Path, index: Path | None = None) -> list[dict[str, str]]:
    """Rows ``{id, split, ...}`` of the assets under a folder.

    They come from ``index`` or ``source/index.csv``; without either, every mesh file is an object of split ``train``. A
    column ``path`` names the mesh file of a row under ``source``; without it the file is ``<id>.<suffix>``.

    Raises:
        InputError: no asset is found, or the index lacks a column.
    """
    table = index or source / "index.csv"
    if table.is_file():
        with table.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        if not rows or not {"id", "split"} <= rows[0].keys():
            raise InputError(f"{table}: expected a CSV with rows and the columns id, split; got {list(rows[:1])}")
        return rows
    files = sorted(p for p in source.rglob("*") if p.suffix.lower() in MESH_SUFFIXES)
    if not files:
        raise InputError(f"{source}: no {', '.join(MESH_SUFFIXES)} file and no index.csv found")
    return [{"id": p.relative_to(source).with_suffix("").as_posix(), "split": "train"} for p in files]


def asset_path(source: Path, object_id: str, path: str | None = None) -> Path:
    """The mesh file of an object: its row's ``path`` under ``source``, or ``<id>.<suffix>`` there or in ``objects``.

    Raises:
        ValueError: there is none, or it lies outside ``source`` (links followed).
    """
    by_id = [f"{folder}{object_id}{suffix}" for folder in ("", "objects/") for suffix in MESH_SUFFIXES]
    for name in [path] if path else by_id:
        try:
            found = (source / name).resolve()
            exists = found.is_file()
        except (OSError, ValueError, RuntimeError):  # too long, a zero byte, or links in a circle: no such file
            continue
        if exists and not found.is_relative_to(source.resolve()):
            raise ValueError(f"{source}: the file {name!r} of {object_id!r} is outside this folder")
        if exists:
            return source / name
    raise ValueError(f"{source}: no mesh file for {object_id!r} (looked for {path or ', '.join(MESH_SUFFIXES)})")


def listed_paths(store: Store) -> dict[str, str]:
    """Mesh file by object id, relative to the assets' folder, of the objects whose index has a column ``path``."""
    if not (store.root / "objects.csv").is_file():
        return {}
    return {row["id"]: row["path"] for row in store.objects() if row.get("path")}


def write_objects(store: Store, rows: list[dict[str, str]]) -> None:
    """Adds objects to ``objects.csv`` of the data set, or replaces their rows; a data set only grows."""
    if (store.root / "objects.csv").is_file():
        rows = list(({row["id"]: row for row in store.objects()} | {row["id"]: row for row in rows}).values())
    write_rows(store.root / "objects.csv", rows)


def render_objects(
    source: Path, store: Store, ids: list[str], settings: RenderSettings, workers: int
) -> dict[str, str]:
    """Renders every object in ``workers`` processes; returns the failures.

    Each process builds its own renderer; :func:`with_renderer` tells beforehand whether that works.
    """
    arguments = settings.model_dump(mode="json")
    start = (str(source), arguments, listed_paths(store))
    return run_stage(store, "render", ids, _render, arguments, Workers(workers, _start, start))


def with_renderer(settings: RenderSettings) -> tuple[RenderSettings, str]:
    """Settings whose renderer works here, its config complete; ``"auto"`` is replaced by the first that does.

    Returns:
        The settings, and what spoke against renderers that ``"auto"`` passed over.

    Raises:
        InputError: the renderer is not installed, does not work here, or refuses its config.
    """
    name, reasons = choose_renderer() if settings.renderer == AUTO else (settings.renderer, "")
    renderer = build(MESH_RENDERER, name, settings.renderer_config)
    config = getattr(renderer, "config", None)
    dumped = config.model_dump(mode="json") if isinstance(config, BaseModel) else settings.renderer_config
    renderer.close()
    return settings.model_copy(update={"renderer": name, "renderer_config": dumped}), reasons


def voxelize_objects(
    source: Path, store: Store, ids: list[str], grid_size: int, workers: int, rule: Rule = "exact"
) -> dict[str, str]:
    """Surface voxels of every object, in ``workers`` processes; returns the failures.

    Raises:
        InputError: objects have features on voxels of the other rule, whose rows would no longer fit.
    """
    lifted = [i for i in ids if store.path("features", i).is_file() and store.path("voxels", i).is_file()]
    if other := [i for i in lifted if voxel_rule(store, i) != rule]:
        raise InputError(
            f"{store.root}: {len(other)} objects have features on voxels of rule {voxel_rule(store, other[0])!r}, got"
            f" --rule {rule}; keep their rule or voxelize into another data set"
        )
    settings = {"grid_size": grid_size, "rule": rule}
    start = (str(source), settings, listed_paths(store))
    return run_stage(store, "voxels", ids, _voxelize, settings, Workers(workers, _start, start))


def voxel_rule(store: Store, object_id: str) -> str:
    """The rule that an object's voxels were found with; before there was a choice it was ``"sampled"``."""
    return str(store.settings("voxels", object_id).get("rule", "sampled"))


_worker: dict[str, Any] = {}  # of a worker process: the assets' folder and files, settings and the renderer


def _start(source: str, settings: dict[str, Any], paths: dict[str, str]) -> None:
    _worker.clear()
    _worker.update(source=Path(source), settings=settings, paths=paths)


def _load(object_id: str) -> Mesh:
    return load_mesh(asset_path(_worker["source"], object_id, _worker["paths"].get(object_id)))


def _voxelize(object_id: str) -> dict[str, np.ndarray]:
    return {"coords": voxelize(_load(object_id), **_worker["settings"]).astype(np.uint8)}


def _render(object_id: str) -> dict[str, np.ndarray]:
    settings = RenderSettings(**_worker["settings"])
    if "renderer" not in _worker:
        _worker["renderer"] = build(MESH_RENDERER, settings.renderer, settings.renderer_config)
    renderer: MeshRenderer = _worker["renderer"]
    mesh = _load(object_id)
    rng = np.random.default_rng([settings.seed, crc32(object_id.encode())])
    spread = sphere_views(settings.num_views, settings.size, rng)
    extra = random_views(settings.num_extra_views, settings.size, rng)
    pose = np.concatenate([spread.world_to_camera, extra.world_to_camera])
    intrinsics = np.concatenate([spread.intrinsics, extra.intrinsics])
    images, depth = renderer(mesh, pose, intrinsics, settings.size)
    png, bounds = encode_pngs(images)
    tensors = {
        "view_png": png,
        "view_bounds": bounds,
        "view_pose": pose,
        "view_intrinsics": intrinsics,
        "view_depth": depth.astype(np.float16),
    }
    if settings.num_condition_views:
        side = settings.condition_frame
        views, azimuth = condition_views(settings.num_condition_views, side, rng, settings.condition_fov)
        frames, _ = renderer(mesh, views.world_to_camera, views.intrinsics, side)
        crops = np.stack([np.rint(object_crop(frame, settings.size) * 255).astype(np.uint8) for frame in frames])
        png, bounds = encode_pngs(crops)
        tensors |= {
            "condition_png": png,
            "condition_bounds": bounds,
            "condition_pose": views.world_to_camera,
            "condition_intrinsics": views.intrinsics,
            "condition_azimuth": azimuth,
        }
    return tensors
