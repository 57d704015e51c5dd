"""``diff2to3 eval``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from diff2to3._errors import InputError

if TYPE_CHECKING:
    from diff2to3.data._store import Store
    from diff2to3.eval._protocol import Protocol

_EMBEDDED = (None, "tiny")
_EMBEDDED_RULE = "sampled"  # of the voxels that it was trained on (configs/tiny/train.sh)
_FOLDER = click.Path(path_type=Path, exists=True, file_okay=False)
_FILE = click.Path(path_type=Path, dir_okay=False)


@click.group(name="eval")
def evaluate() -> None:
    """Measure a pipeline against objects whose truth is known, every figure beside its controls."""


def _shared(function: Callable[..., None]) -> Callable[..., None]:
    """Options of both measurements of a pipeline."""
    for option in (
        click.option("--output", type=_FILE, help="JSON with all figures; a table (.md) and a page (.html) beside it."),
        click.option("--shown", type=click.IntRange(min=0), default=48, show_default=True, help="Objects on the page."),
        click.option("--lpips", type=click.Path(path_type=Path), help="LPIPS-VGG weights (safetensors)."),
        click.option("--device", default=None, help="Default: a GPU if there is one."),
        click.option("--protocol", "protocol_file", type=_FILE, help="Frozen protocol to follow; written if missing."),
        click.option(
            "--limit",
            type=click.IntRange(min=1),
            default=64,
            show_default=True,
            help="Objects of a new protocol, spread over the split.",
        ),
        click.option("--split", default="val", show_default=True, help="Of a new protocol."),
        click.option("--data", type=_FOLDER, required=True, help="Data set with stages render and voxels."),
        click.option("--pipeline", default=None, help="Name, directory or Hub id; default the embedded one."),
    ):
        function = option(function)
    return function


@evaluate.command()
@_shared
@click.option("--extractor", type=_FOLDER, help="Model folder of `train autoencoder`, instead of a pipeline's.")
@click.option("--vae", type=_FOLDER, help="Model folder of `train vae`, instead of a pipeline's.")
@click.option(
    "--views", type=int, default=32, show_default=True, help="Views encoded; the stored ones past them are scored."
)
@click.option("--visibility", type=click.Choice(["all", "depth"]), default="depth", show_default=True)
def reconstruction(
    pipeline: str | None,
    data: Path,
    device: str | None,
    lpips: Path | None,
    output: Path | None,
    extractor: Path | None,
    vae: Path | None,
    views: int,
    visibility: str,
    shown: int,
    **protocol: Any,
) -> None:
    """2to3-VAE: encode from rendered views, decode, compare at unseen views."""
    from diff2to3.data._store import Store
    from diff2to3.eval._reconstruction import evaluate_reconstruction
    from diff2to3.eval._report import report_reconstruction
    from diff2to3.eval._vae import pipeline_models, trained_models

    if (extractor is None) != (vae is None):
        raise click.UsageError("--extractor and --vae go together: give both, or neither for the models of a pipeline")
    store = Store(data)
    ids = _object_ids(store, **protocol)
    if extractor is not None and vae is not None:
        models = trained_models(extractor, vae, device)
    else:
        models = pipeline_models(pipeline, device)
    _say_rule(store, ids, embedded=vae is None and pipeline in _EMBEDDED)
    encoder: Any = models[0]
    place = next(models[1].parameters()).device
    table = {row["id"]: row for row in store.objects()}
    rows = [table[i] for i in ids]
    scores = evaluate_reconstruction(
        encoder, models[1], store, rows, num_views=views, visibility=visibility, lpips=_lpips(lpips, place), shown=shown
    )
    settings = {"views": views, "visibility": visibility, "ids": ids, "background": "white"}
    click.echo(report_reconstruction(scores, settings, output))


@evaluate.command()
@_shared
@click.option("--source", type=_FOLDER, help="Folder of the meshes the data set was made from.")
@click.option("--assets", type=_FOLDER, help="With --method what that made; without it the same as --source.")
@click.option("--method", help="Score --assets, made by this method (Shap-E, LGM ...), instead of a pipeline.")
@click.option(
    "--convention", multiple=True, metavar="KEY=VALUE", help="Replaces the method's up, front, frame or scale."
)
@click.option(
    "--inputs",
    type=click.Path(path_type=Path, file_okay=False),
    help="Only write the input pictures here, for another method.",
)
@click.option("--size", type=int, default=256, show_default=True, help="Side of the pictures of a new protocol.")
@click.option(
    "--weights",
    multiple=True,
    metavar="NETWORK=WEIGHTS",
    help="Network for FD and KD: inception, dinov2 or vgg, or clip for the CLIP score; a path or Hub id (repeatable).",
)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--steps", type=int, default=None)
@click.option("--guidance", type=float, default=None)
@click.option("--renderer", default="auto", show_default=True, help="Draws the truth, as in `data render`.")
def generation(
    pipeline: str | None,
    data: Path,
    device: str | None,
    lpips: Path | None,
    output: Path | None,
    source: Path | None,
    assets: Path | None,
    method: str | None,
    convention: tuple[str, ...],
    inputs: Path | None,
    size: int,
    weights: tuple[str, ...],
    seed: int,
    steps: int | None,
    guidance: float | None,
    renderer: str,
    shown: int,
    **protocol: Any,
) -> None:
    """One picture in: the asset compared from that picture's camera and around, with the true object.

    With --method it is one that another system made of the pictures that --inputs wrote.
    """
    from diff2to3.data._store import Store
    from diff2to3.eval._generation import evaluate_generation
    from diff2to3.eval._networks import open_networks
    from diff2to3.eval._report import report_generation
    from diff2to3.eval._truth import draw_truth, write_inputs

    if method is not None and assets is None:
        raise click.UsageError("--method needs --assets DIR, the folder of what it made")
    if convention and method is None:
        raise click.UsageError("--convention changes that of a --method; none was given")
    store = Store(data)
    frozen = _protocol(store, size=size, **protocol)
    measured = {"lpips": _lpips(lpips, device or "cpu"), "networks": open_networks(_pairs(weights), _place(device))}
    make, settings = _method(method, assets, convention, frozen, renderer) if method else (None, {})
    draw_truth(store, source or (None if method else assets), frozen, renderer)
    if inputs is not None:
        click.echo(f"{inputs}: {write_inputs(store, frozen, inputs)} pictures")
        return
    if make is None:
        from diff2to3._pipeline import Pipeline
        from diff2to3.eval._generation import pipeline_maker

        loaded = Pipeline.from_pretrained(pipeline, device=device)
        _say_rule(store, frozen.ids, embedded=pipeline in _EMBEDDED)
        sampling = {"steps": steps, "guidance": guidance}
        make = pipeline_maker(loaded, seed=seed, sampling=sampling)
        settings = {"pipeline": loaded.config.name, "weights": loaded.weight_hashes(), "seed": seed, **sampling}
    scores = evaluate_generation(make, store, frozen, shown=shown, **measured)
    settings |= {"networks": dict(_pairs(weights)), "protocol_sha256": frozen.digest}
    click.echo(report_generation(scores, settings, frozen, output))


@evaluate.command()
@click.argument("config", type=click.Path(path_type=Path))
@click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a setting (dotted keys, YAML values)."
)
@click.option("--merge", multiple=True, type=_FOLDER, help="Run folder whose results join the table (repeatable).")
@click.option("--row", "rows", multiple=True, help="Work on this row only (repeatable); others may run beside.")
@click.option("--minutes", type=float, help="Begin nothing new after this time; the next run goes on.")
@click.option("--table-only", is_flag=True, help="Train and score nothing: write the table of what is there.")
def ablation(
    config: Path,
    overrides: tuple[str, ...],
    merge: tuple[Path, ...],
    rows: tuple[str, ...],
    minutes: float | None,
    table_only: bool,
) -> None:
    """Train and score the rows of the paper's table 3 as CONFIG says; what is done is not done again."""
    from diff2to3.eval._ablation_config import load_ablation

    settings = load_ablation(config, overrides)
    from diff2to3.eval._ablation import run_ablation

    click.echo(run_ablation(settings, merge, minutes, table_only, rows))


def _method(name: str, assets: Path | None, convention: tuple[str, ...], protocol: Protocol, renderer: str) -> Any:
    """The maker of a method's assets, and the settings that the results name."""
    from diff2to3.data._renderers import open_renderer
    from diff2to3.eval._methods import asset_maker, find_method

    found = find_method(name, convention)
    if not found.checked and not convention:
        click.echo(f"warning: the axes of {name} are assumed ({found.source}); see --convention", err=True)
    assert assets is not None
    make = asset_maker(assets, found, protocol, lambda: open_renderer(renderer))
    return make, {"method": name, "convention": found.model_dump(mode="json")}


def _protocol(store: Store, protocol_file: Path | None, split: str, limit: int, size: int) -> Protocol:
    """The protocol of a file, or a new one, kept in that file if one is named."""
    from diff2to3.eval._protocol import freeze_protocol, read_protocol

    if protocol_file is not None and protocol_file.exists():
        return read_protocol(protocol_file)
    protocol = freeze_protocol(store, split, limit, size)
    if protocol_file is not None:
        protocol.write(protocol_file)
    return protocol


def _object_ids(store: Store, protocol_file: Path | None, split: str, limit: int) -> list[str]:
    """Of a protocol's objects; without one, of rendered objects spread over the split."""
    from diff2to3.eval._protocol import choose_objects, refuse_unknown_objects

    if protocol_file is None:
        return [row["id"] for row in choose_objects(store, split, limit)]
    protocol = _protocol(store, protocol_file, split, limit, size=256)
    refuse_unknown_objects(store, protocol)
    return list(protocol.ids)


def _pairs(weights: tuple[str, ...]) -> dict[str, str]:
    from diff2to3.eval._networks import NETWORKS

    pairs = {}
    for text in weights:
        name, equals, source = text.partition("=")
        if name not in NETWORKS or not equals:
            raise InputError(f"--weights {text}: expected NETWORK=WEIGHTS with one of {', '.join(NETWORKS)}")
        pairs[name] = source
    return pairs


def _place(device: str | None) -> str:
    from diff2to3._device import usable_device

    return str(usable_device(device))


def _say_rule(store: Store, ids: list[str], embedded: bool) -> None:
    """Says which rule the voxels were found with: figures of two rules, or another than the models', do not compare."""
    from diff2to3.data._render_stage import voxel_rule

    rules = sorted({voxel_rule(store, i) for i in ids})
    click.echo(f"voxels found with rule {' and '.join(rules)}", err=True)
    if embedded and rules != [_EMBEDDED_RULE]:
        click.echo(
            f"warning: the embedded pipeline was trained on {_EMBEDDED_RULE} voxels; for figures that compare with"
            f" its published ones run `diff2to3 data voxelize --rule {_EMBEDDED_RULE}`",
            err=True,
        )


def _lpips(path: Path | None, device: Any) -> Any:
    if path is None:
        return None
    from gs_render.metrics import LPIPS

    try:
        return LPIPS(path).to(device)
    except (OSError, ValueError) as error:
        raise InputError(f"--lpips {error}") from error
