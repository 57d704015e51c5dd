"""``diff2to3 data``."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import click

from diff2to3._errors import InputError

if TYPE_CHECKING:
    from diff2to3._engines import Workers
    from diff2to3.data._store import Store

_ASSETS = click.Path(path_type=Path, exists=True, file_okay=False)
_FOLDER = click.Path(path_type=Path, file_okay=False)
_POSITIVE = click.IntRange(min=1)
_ENGINE = click.option(
    "--engine",
    type=click.Choice(["local", "ray"]),
    default="local",
    show_default=True,
    help="Where the work is done: on this machine, or on a Ray cluster (extra `scale`).",
)
F = TypeVar("F", bound=Callable[..., Any])


@click.group()
def data() -> None:
    """Prepare a data set: index, render, voxelize, features, latents, pack (each resumable); make or vary assets."""


def _report(stage: str, count: int, failures: dict[str, str]) -> None:
    """What a stage did; exit code 1 if nothing came of it."""
    for object_id, reason in failures.items():
        click.echo(f"{stage}: {object_id}: {reason}", err=True)
    click.echo(f"{stage}: {count - len(failures)} objects done, {len(failures)} failed")
    if failures and len(failures) == count:
        raise click.exceptions.Exit(1)


def _over_assets(function: F) -> F:
    """Options of the stages that read assets."""
    for option in (
        click.option("--workers", type=_POSITIVE, show_default="all cores", help="Processes."),
        _ENGINE,
        click.option("--limit", type=_POSITIVE, help="Only the first N objects of each split."),
        click.option("--split", "splits", multiple=True, help="Only these splits (repeatable); default all."),
        click.option(
            "--index",
            type=click.Path(path_type=Path, exists=True, dir_okay=False),
            help="CSV with columns id, split (and path); default SOURCE/index.csv, and without it every mesh file.",
        ),
    ):
        function = option(function)
    return function


@contextmanager
def _processes(engine: str, workers: int | None) -> Iterator[int]:
    """Stages run on an engine; gives the number of processes asked for, all cores by default."""
    from diff2to3._engines import using_engine

    with using_engine(engine):
        yield workers or (sys.maxsize if engine == "ray" else os.cpu_count() or 1)  # Ray has its cluster's cores


def _rows(source: Path, index: Path | None, splits: tuple[str, ...], limit: int | None) -> list[dict[str, str]]:
    from diff2to3.data._render_stage import list_assets

    rows = list_assets(source, index)
    known = tuple(dict.fromkeys(row["split"] for row in rows))
    if unknown := sorted(set(splits) - set(known)):
        raise InputError(f"--split {unknown[0]}: {source} has {', '.join(known)}")
    return [row for name in splits or known for row in [r for r in rows if r["split"] == name][:limit]]


@data.command()
@click.argument("source", type=_ASSETS)
@click.argument("out", type=_FOLDER)
@_over_assets
@click.option("--size", type=_POSITIVE, default=256, show_default=True, help="Side of a picture in pixels.")
@click.option("--views", type=_POSITIVE, default=32, show_default=True, help="Views over the sphere, for features.")
@click.option("--extra-views", type=int, default=8, show_default=True, help="Random views, unseen by the features.")
@click.option("--condition-views", type=int, default=12, show_default=True, help="Views as a person would photograph.")
@click.option(
    "--condition-fov",
    type=(float, float),
    default=(20.0, 60.0),
    show_default=True,
    metavar="LOW HIGH",
    help="Their fields of view, degrees.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the cameras.")
@click.option(
    "--renderer",
    default="auto",
    show_default=True,
    metavar="NAME",
    help="gl, cpu, blender or a plugin's (see `diff2to3 plugins`); auto: gl on a GPU, else cpu.",
)
@click.option(
    "--renderer-set", "overrides", multiple=True, metavar="KEY=VALUE", help="Setting of the renderer (repeatable)."
)
def render(
    source: Path,
    out: Path,
    index: Path | None,
    splits: tuple[str, ...],
    limit: int | None,
    workers: int | None,
    engine: str,
    size: int,
    condition_fov: tuple[float, float],
    renderer: str,
    overrides: tuple[str, ...],
    **counts: int,
) -> None:
    """Render the assets under SOURCE into the data set OUT."""
    from pydantic import ValidationError

    from diff2to3.data._render_stage import RenderSettings, render_objects, with_renderer, write_objects
    from diff2to3.data._store import Store

    try:
        settings = RenderSettings(
            size=size,
            num_views=counts["views"],
            num_extra_views=counts["extra_views"],
            num_condition_views=counts["condition_views"],
            condition_fov=condition_fov,
            seed=counts["seed"],
            renderer=renderer,
            renderer_config=dict(_key_and_value(override) for override in overrides),
        )
    except ValidationError as error:
        first = error.errors()[0]
        raise InputError(f"{first['loc'][0]}: {first['msg']}, got {first['input']}") from error
    with _processes(engine, workers) as processes:
        rows, store = _rows(source, index, splits, limit), Store(out)
        settings, passed_over = with_renderer(settings)
        click.echo(f"render: renderer {settings.renderer}{passed_over and f' ({passed_over})'}", err=True)
        write_objects(store, rows)
        failures = render_objects(source.resolve(), store, [row["id"] for row in rows], settings, processes)
    _report("render", len(rows), failures)


def _key_and_value(override: str) -> tuple[str, Any]:
    """``samples=64`` -> ("samples", 64); values are JSON, and otherwise text."""
    key, equals, value = override.partition("=")
    if not key or not equals:
        raise InputError(f"--renderer-set {override}: expected key=value")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


@data.command()
@click.argument("source", type=_ASSETS)
@click.argument("out", type=_FOLDER)
@_over_assets
@click.option("--grid-size", type=click.IntRange(1, 256), default=32, show_default=True, help="Voxels along each axis.")
@click.option(
    "--rule",
    type=click.Choice(["exact", "sampled"]),
    default="exact",
    show_default=True,
    help="Every voxel that the surface passes through, or those that points a quarter of a voxel apart find.",
)
def voxelize(
    source: Path,
    out: Path,
    index: Path | None,
    splits: tuple[str, ...],
    limit: int | None,
    workers: int | None,
    engine: str,
    grid_size: int,
    rule: Literal["exact", "sampled"],
) -> None:
    """Surface voxels of the assets under SOURCE, into the data set OUT."""
    from diff2to3.data._render_stage import voxelize_objects, write_objects
    from diff2to3.data._store import Store

    with _processes(engine, workers) as processes:
        rows, store = _rows(source, index, splits, limit), Store(out)
        write_objects(store, rows)
        failures = voxelize_objects(source.resolve(), store, [row["id"] for row in rows], grid_size, processes, rule)
    _report("voxels", len(rows), failures)


@data.command()
@click.argument("out", type=_FOLDER)
@click.option(
    "--extractor",
    required=True,
    metavar="SOURCE",
    help="Weights: `tiny` (embedded) or a pipeline, a model folder of `diff2to3 train autoencoder`, a directory or "
    "ae.safetensors of FLUX, FLUX.2 or DINOv2, VGG16's LPIPS file, or a Hub id.",
)
@click.option("--preset", help="Of a Hub id that is not well known: paper, flux2, taef1, taef2 or dino.")
@click.option(
    "--library",
    type=click.Choice(["transformers", "timm"]),
    default="transformers",
    show_default=True,
    help="Whose network runs DINOv2.",
)
@click.option("--accept-licence", is_flag=True, help="Agree to the licence of gated weights without being asked.")
@click.option("--views", type=_POSITIVE, default=32, show_default=True, help="The first N rendered views are used.")
@click.option("--variants", type=_POSITIVE, default=4, show_default=True, help="Colour variants, the first unchanged.")
@click.option("--visibility", type=click.Choice(["all", "depth"]), default="depth", show_default=True)
@click.option("--grid-size", type=_POSITIVE, default=32, show_default=True, help="As given to voxelize.")
@click.option("--device", default=None, help="Default: a GPU if there is one.")
@click.option("--shard", default="0/1", show_default=True, help="I/N: this process's share of the objects.")
@click.option("--workers", type=_POSITIVE, show_default="all GPUs", help="Processes of engine ray; local has one.")
@_ENGINE
def features(
    out: Path,
    views: int,
    variants: int,
    visibility: Literal["all", "depth"],
    grid_size: int,
    device: str | None,
    shard: str,
    workers: int | None,
    engine: str,
    extractor: str,
    **weights: Any,
) -> None:
    """Lift picture features onto voxels, for every object of the data set OUT."""
    from diff2to3.data._extractor import ExtractorChoice
    from diff2to3.data._feature_stage import FeatureSettings, lift_objects
    from diff2to3.data._models import load_lifting

    store, ids = _shard(out, "voxels", shard)
    settings = FeatureSettings(num_views=views, num_variants=variants, visibility=visibility)
    local = Path(extractor).exists()  # workers on other machines start in another folder
    choice = ExtractorChoice(source=str(Path(extractor).resolve()) if local else extractor, **weights)
    model = _model_work(engine, workers, load_lifting, choice, device, store, settings, grid_size)
    with model as (work, digest, processes):
        failures = lift_objects(work, store, ids, settings, digest, grid_size, processes)
    _report("features", len(ids), failures)


@data.command()
@click.argument("out", type=_FOLDER)
@click.option(
    "--vae", type=_ASSETS, required=True, help="Model folder of `diff2to3 train vae`; its statistics are updated."
)
@click.option("--device", default=None, help="Default: a GPU if there is one.")
@click.option("--shard", default="0/1", show_default=True, help="I/N: this process's share of the objects.")
@click.option("--workers", type=_POSITIVE, show_default="all GPUs", help="Processes of engine ray; local has one.")
@_ENGINE
def latents(out: Path, vae: Path, device: str | None, shard: str, workers: int | None, engine: str) -> None:
    """Encode features into 2to3-VAE latents; stores their mean and deviation (of split train) in the VAE's config."""
    from sparse_vae import SparseVAEConfig

    from diff2to3.data._feature_stage import encode_objects, latent_statistics
    from diff2to3.data._models import load_encoding
    from diff2to3.data._store import write_atomically
    from diff2to3.train._checkpoint import read_config

    store, ids = _shard(out, "features", shard)
    with _model_work(engine, workers, load_encoding, vae.resolve(), device, store) as (work, digest, processes):
        failures = encode_objects(work, store, ids, digest, processes)
    _report("latents", len(ids), failures)
    done = [i for i in ids if i not in failures]
    train = {row["id"] for row in store.objects("train")}
    mean, std = latent_statistics(store, [i for i in done if i in train] or done)
    config = read_config(vae, SparseVAEConfig).model_copy(update={"latent_mean": tuple(mean), "latent_std": tuple(std)})
    write_atomically(vae / "config.json", config.model_dump_json(indent=1).encode())


@data.command()
@click.argument("name", type=click.Choice(["abo", "hssd", "3d-future", "objaverse-xl", "toys4k"]))
@click.argument("folder", metavar="DIR", type=_ASSETS)
@click.option("--output", type=click.Path(path_type=Path, dir_okay=False), help="Default: DIR/index.csv.")
@click.option("--texture-quality", is_flag=True, help="Leave out assets with low-quality textures; loads every asset.")
@click.option("--workers", type=_POSITIVE, show_default="all cores", help="Processes, for --texture-quality.")
def index(name: str, folder: Path, output: Path | None, texture_quality: bool, workers: int | None) -> None:
    """Index a known data set that was downloaded to DIR: id, split, licence and path of every asset."""
    from diff2to3.data._datasets import good_texture, index_dataset, measure_textures
    from diff2to3.data._store import Store, write_rows

    output = output or folder / "index.csv"
    rows = index_dataset(name, folder)
    summary = f"index: {len(rows)} assets found"
    if texture_quality:
        store = Store(output.with_name(f"{output.stem}-measured"))  # resumable: an asset is measured once
        measured, failures = measure_textures(folder, store, rows, workers or os.cpu_count() or 1)
        rows = [row for row in measured if good_texture(row)]
        for object_id, reason in failures.items():
            click.echo(f"index: {object_id}: {reason}", err=True)
        summary += f", {len(rows)} kept, {len(measured) - len(rows)} with low-quality textures"
        summary += f", {len(failures)} unreadable"
    if not rows:
        raise InputError(f"{summary}; {output} is not written")
    write_rows(output, rows)
    click.echo(f"{summary}; {output}")


@data.command()
@click.argument("out", type=_FOLDER)
@click.option("--count", type=_POSITIVE, default=8, show_default=True, help="Number of objects.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
def synthesize(out: Path, count: int, seed: int) -> None:
    """Make textured procedural objects as .glb files under OUT, with an index.csv."""
    from diff2to3.data._synthesize import synthesize as run

    run(out, count, seed)
    click.echo(f"synthesize: {count} objects in {out}")


@data.command()
@click.argument("source", type=_ASSETS)
@click.argument("out", type=_FOLDER)
@click.option("--copies", type=_POSITIVE, default=2, show_default=True, help="Stretched copies of each object.")
@click.option("--stretch", type=click.FloatRange(0, 4), default=0.3, show_default=True, help="Most that an axis grows.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option("--split", default="train", show_default=True, help="Whose objects are copied.")
def vary(source: Path, out: Path, copies: int, stretch: float, seed: int, split: str) -> None:
    """Write the assets of SOURCE and stretched copies of the .glb files under OUT, to learn from more shapes."""
    from diff2to3.data._vary import vary as run

    rows = _rows(source, None, (), None)
    if split not in {row["split"] for row in rows}:
        raise InputError(f"--split {split}: no object of {source} is in it")
    kept, failures = run(source, out, rows, copies=copies, stretch=stretch, seed=seed, split=split)
    _report("vary", len(rows), failures)
    click.echo(f"vary: {len(kept)} assets in {out}")


@data.command()
@click.argument("source", metavar="SET", type=_ASSETS)
@click.argument("out", type=_FOLDER)
@click.option(
    "--stage",
    "stages",
    multiple=True,
    type=click.Choice(["render", "voxels", "features", "latents"]),
    help="Only these stages (repeatable); default all that are finished.",
)
@click.option("--shard-size", default="256MB", show_default=True, help="Most bytes of a shard: KB, MB or GB.")
def pack(source: Path, out: Path, stages: tuple[str, ...], shard_size: str) -> None:
    """Pack the data set SET into WebDataset shards under OUT, for streaming."""
    from diff2to3._atomic import writing
    from diff2to3.data._shards import pack as run
    from diff2to3.data._store import Store

    size = re.fullmatch(r"([1-9]\d*)([KMG]B)", shard_size.upper())
    if size is None:
        raise InputError(f"--shard-size {shard_size}: expected a number with KB, MB or GB, for example 256MB")
    with writing(out):
        index = run(Store(source), out, stages, int(size[1]) * {"KB": 10**3, "MB": 10**6, "GB": 10**9}[size[2]])
    for object_id, reason in index["skipped"].items():
        click.echo(f"pack: {object_id}: {reason}", err=True)
    click.echo(f"pack: {index['objects']} objects in {len(index['shards'])} shards, {len(index['skipped'])} left out")


def _shard(out: Path, needs: str, shard: str) -> tuple[Store, list[str]]:
    """The data set and this process's share of the objects that have the stage ``needs``."""
    from diff2to3.data._store import Store

    try:
        index, count = (int(part) for part in shard.split("/"))
        if not 0 <= index < count:
            raise ValueError
    except ValueError:
        raise InputError(f"--shard {shard}: expected I/N with 0 <= I < N, for example 0/2") from None
    store = Store(out.resolve())  # workers on other machines start in another folder
    ids = [row["id"] for row in store.objects() if store.path(needs, row["id"]).is_file()]
    if not ids:
        raise InputError(f"{out}: no object has the stage {needs!r} yet; run `diff2to3 data` for it first")
    return store, ids[index::count]


@contextmanager
def _model_work(
    engine: str, workers: int | None, load: Callable[..., tuple[Any, str]], source: Any, device: str | None, *rest: Any
) -> Iterator[tuple[Any, str, Workers | None]]:
    """The work of a stage that needs a model, the hash of its weights, and the workers that load it themselves."""
    from diff2to3._engines import Workers
    from diff2to3.data._feature_stage import model_work, start_model_work

    with _processes(engine, workers) as processes:
        work, digest = load(source, "cpu" if engine == "ray" else device, *rest)
        if engine == "ray":
            arguments = (load, source, device, *rest)
            yield model_work, digest, Workers(processes, start_model_work, arguments, on_gpu=True)
        else:
            yield work, digest, None
