"""``diff2to3 data``."""

from __future__ import annotations

import os
from pathlib import Path

import click

_ASSETS = click.Path(path_type=Path, exists=True, file_okay=False)
_FOLDER = click.Path(path_type=Path, file_okay=False)


@click.group()
def data() -> None:
    """Prepare a data set: render, voxelize, features, latents (each resumable), or synthesize assets."""


def _report(stage: str, count: int, failures: dict[str, str]) -> None:
    for object_id, reason in failures.items():
        click.echo(f"{stage}: {object_id}: {reason}", err=True)
    click.echo(f"{stage}: {count - len(failures)} objects done, {len(failures)} failed")


def _shared(function):
    function = click.option(
        "--index", type=click.Path(path_type=Path, exists=True), help="CSV with columns id, split."
    )(function)
    function = click.option("--split", "splits", multiple=True, help="Only these splits (repeatable); default all.")(
        function
    )
    function = click.option("--limit", type=int, help="Only the first N objects of each split.")(function)
    return click.option("--workers", type=int, default=os.cpu_count(), show_default="all cores")(function)


def _rows(source: Path, index: Path | None, splits: tuple[str, ...], limit: int | None) -> list[dict[str, str]]:
    from diff2to3.data._render_stage import list_assets

    rows = list_assets(source, index)
    names = splits or tuple(dict.fromkeys(row["split"] for row in rows))
    return [row for name in names for row in [r for r in rows if r["split"] == name][:limit]]


@data.command()
@click.argument("source", type=_ASSETS)
@click.argument("out", type=_FOLDER)
@_shared
@click.option("--size", type=int, default=256, show_default=True, help="Side of a picture in pixels.")
@click.option("--views", type=int, default=32, show_default=True, help="Views spread over the sphere, for features.")
@click.option(
    "--extra-views", type=int, default=8, show_default=True, help="More random views, unseen by the features."
)
@click.option(
    "--condition-views", type=int, default=12, show_default=True, help="Views a person would photograph from."
)
def render(source, out, index, splits, limit, workers, size, views, extra_views, condition_views) -> None:
    """Render the assets under SOURCE into the data set OUT."""
    from diff2to3.data._render_stage import RenderSettings, render_objects, write_objects
    from diff2to3.data._store import Store

    rows, store = _rows(source, index, splits, limit), Store(out)
    settings = RenderSettings(
        size=size, num_views=views, num_extra_views=extra_views, num_condition_views=condition_views
    )
    write_objects(store, rows)
    _report("render", len(rows), render_objects(source, store, [row["id"] for row in rows], settings, workers))


@data.command()
@click.argument("source", type=_ASSETS)
@click.argument("out", type=_FOLDER)
@_shared
@click.option("--grid-size", type=int, default=32, show_default=True, help="Voxels along each axis.")
def voxelize(source, out, index, splits, limit, workers, grid_size) -> None:
    """Surface voxels of the assets under SOURCE, into the data set OUT."""
    from diff2to3.data._render_stage import voxelize_objects, write_objects
    from diff2to3.data._store import Store

    rows, store = _rows(source, index, splits, limit), Store(out)
    write_objects(store, rows)
    _report("voxels", len(rows), voxelize_objects(source, store, [row["id"] for row in rows], grid_size, workers))


@data.command()
@click.argument("out", type=_FOLDER)
@click.option("--extractor", type=_ASSETS, required=True, help="Model folder of `diff2to3 train autoencoder`.")
@click.option("--views", type=int, default=32, show_default=True)
@click.option(
    "--variants", type=int, default=4, show_default=True, help="Colour variants an object, the first unchanged."
)
@click.option("--visibility", type=click.Choice(["all", "depth"]), default="depth", show_default=True)
@click.option("--grid-size", type=int, default=32, show_default=True)
@click.option("--device", default=None)
@click.option("--shard", default="0/1", show_default=True, help="I/N: this process's share of the objects.")
def features(out, extractor, views, variants, visibility, grid_size, device, shard) -> None:
    """Lift picture features onto voxels, for every object of the data set OUT."""
    from flux_features import FluxFeatures, FluxFeaturesConfig

    from diff2to3.data._feature_stage import FeatureSettings, lift_objects

    store, ids = _shard(out, "voxels", shard)
    model, digest = _load(FluxFeatures, FluxFeaturesConfig, extractor, device)
    settings = FeatureSettings(num_views=views, num_variants=variants, visibility=visibility)
    _report("features", len(ids), lift_objects(model, store, ids, settings, digest, grid_size))


@data.command()
@click.argument("out", type=_FOLDER)
@click.option(
    "--vae", type=_ASSETS, required=True, help="Model folder of `diff2to3 train vae`; its statistics are updated."
)
@click.option("--device", default=None)
@click.option("--shard", default="0/1", show_default=True, help="I/N: this process's share of the objects.")
def latents(out, vae, device, shard) -> None:
    """Encode features into 2to3-VAE latents; stores their mean and deviation (of split train) in the VAE's config."""
    from sparse_vae import SparseVAE, SparseVAEConfig

    from diff2to3.data._feature_stage import encode_objects, latent_statistics
    from diff2to3.data._store import write_atomically
    from diff2to3.train._checkpoint import read_config

    store, ids = _shard(out, "features", shard)
    model, digest = _load(SparseVAE, SparseVAEConfig, vae, device)
    _report("latents", len(ids), encode_objects(model, store, ids, digest))
    train_ids = [row["id"] for row in store.objects("train") if row["id"] in set(ids)] or ids
    mean, std = latent_statistics(store, train_ids)
    config = read_config(vae, SparseVAEConfig).model_copy(update={"latent_mean": tuple(mean), "latent_std": tuple(std)})
    write_atomically(vae / "config.json", config.model_dump_json(indent=1).encode())


@data.command()
@click.argument("out", type=_FOLDER)
@click.option("--count", type=int, default=8, show_default=True, help="Number of objects.")
@click.option("--seed", type=int, default=0, show_default=True)
def synthesize(out, count, seed) -> None:
    """Make textured procedural objects as .glb files under OUT, with an index.csv."""
    from diff2to3.data._synthesize import synthesize as run

    run(out, count, seed)


def _shard(out: Path, needs: str, shard: str):
    from diff2to3.data._store import Store

    try:
        index, count = (int(part) for part in shard.split("/"))
    except ValueError:
        raise click.UsageError(f"--shard {shard}: expected I/N, for example 0/2") from None
    store = Store(out)
    ids = [row["id"] for row in store.objects() if store.path(needs, row["id"]).is_file()]
    return store, ids[index::count]


def _load(model_class, config_class, folder: Path, device: str | None):
    import torch

    from diff2to3._store import state_sha256
    from diff2to3.train._checkpoint import read_config, read_weights

    model = model_class(read_config(folder, config_class))
    model.load_state_dict(read_weights(folder))
    digest = state_sha256(model)
    return model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval(), digest
