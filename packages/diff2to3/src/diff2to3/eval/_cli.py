"""``diff2to3 eval``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from diff2to3.data._store import Store

_EMBEDDED = (None, "tiny")
_EMBEDDED_RULE = "sampled"  # of the voxels that it was trained on (configs/tiny/train.sh)
_FOLDER = click.Path(path_type=Path, exists=True, file_okay=False)


@click.group(name="eval")
def evaluate() -> None:
    """Measure a pipeline against objects whose truth is known, every figure beside its controls."""


def _shared(function):
    function = click.option("--pipeline", default=None, help="Name, directory or Hub id; default the embedded one.")(
        function
    )
    function = click.option("--data", type=_FOLDER, required=True, help="Data set with stages render and voxels.")(
        function
    )
    function = click.option("--split", default="val", show_default=True)(function)
    function = click.option("--limit", type=int, default=64, show_default=True, help="Objects, spread over the split.")(
        function
    )
    function = click.option("--device", default=None)(function)
    function = click.option(
        "--lpips", type=click.Path(path_type=Path, exists=True), help="LPIPS-VGG weights (safetensors)."
    )(function)
    return click.option("--output", type=click.Path(path_type=Path), help="JSON with the figures of every object.")(
        function
    )


@evaluate.command()
@_shared
@click.option("--extractor", type=_FOLDER, help="Model folder of `train autoencoder`, instead of a pipeline's.")
@click.option("--vae", type=_FOLDER, help="Model folder of `train vae`, instead of a pipeline's.")
@click.option(
    "--views", type=int, default=32, show_default=True, help="Views encoded; the stored ones past them are scored."
)
@click.option("--visibility", type=click.Choice(["all", "depth"]), default="depth", show_default=True)
def reconstruction(pipeline, data, split, limit, device, lpips, output, extractor, vae, views, visibility) -> None:
    """2to3-VAE: encode from rendered views, decode, compare at unseen views."""
    from diff2to3.eval._reconstruction import evaluate_reconstruction
    from diff2to3.eval._vae import pipeline_models, trained_models

    if (extractor is None) != (vae is None):
        raise click.UsageError("--extractor and --vae go together: give both, or neither for the models of a pipeline")
    models = trained_models(extractor, vae, device) if vae else pipeline_models(pipeline, device)
    store, rows = _objects(data, split, limit)
    _say_rule(store, rows, embedded=vae is None and pipeline in _EMBEDDED)
    place = next(models[1].parameters()).device
    scores = evaluate_reconstruction(
        *models, store, rows, num_views=views, visibility=visibility, lpips=_lpips(lpips, place)
    )
    _report(scores, output)


@evaluate.command()
@_shared
@click.option("--assets", type=_FOLDER, required=True, help="Folder of the meshes the data set was made from.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--steps", type=int, default=None)
@click.option("--guidance", type=float, default=None)
@click.option("--renderer", default="auto", show_default=True, help="Draws the input, as in `data render`.")
@click.option("--gallery", type=click.Path(path_type=Path), help="PNG with a row an object.")
def generation(
    pipeline, data, split, limit, device, lpips, output, assets, seed, steps, guidance, renderer, gallery
) -> None:
    """Whole pipeline: one view in, the asset drawn from that view's camera."""
    from diff2to3._pipeline import Pipeline
    from diff2to3.eval._generation import evaluate_generation

    loaded = Pipeline.from_pretrained(pipeline, device=device)
    store, rows = _objects(data, split, limit)
    _say_rule(store, rows, embedded=pipeline in _EMBEDDED)
    scores = evaluate_generation(
        loaded,
        store,
        assets,
        rows,
        seed=seed,
        sampling={"steps": steps, "guidance": guidance},
        lpips=_lpips(lpips, "cpu"),
        gallery=gallery,
        renderer=renderer,
    )
    _report(scores, output)


def _objects(data: Path, split: str, limit: int):
    from diff2to3.data._store import Store

    store = Store(data)
    rows = [row for row in store.objects(split) if store.path("render", row["id"]).is_file()]
    if not rows:
        raise click.UsageError(f"{data}: no rendered object in split {split!r}")
    step = max(1, len(rows) / limit)
    return store, [rows[int(i * step)] for i in range(min(limit, len(rows)))]


def _say_rule(store: Store, rows: list[dict[str, str]], embedded: bool) -> None:
    """Says which rule the voxels were found with: figures of two rules, or another than the models', do not compare."""
    from diff2to3.data._render_stage import voxel_rule

    rules = sorted({voxel_rule(store, row["id"]) for row in rows})
    click.echo(f"voxels found with rule {' and '.join(rules)}", err=True)
    if embedded and rules != [_EMBEDDED_RULE]:
        click.echo(
            f"warning: the embedded pipeline was trained on {_EMBEDDED_RULE} voxels; for figures that compare with"
            f" its published ones run `diff2to3 data voxelize --rule {_EMBEDDED_RULE}`",
            err=True,
        )


def _lpips(path: Path | None, device):
    if path is None:
        return None
    from gs_render.metrics import LPIPS

    return LPIPS(path).to(device)


def _report(scores: list[dict[str, Any]], output: Path | None) -> None:
    from diff2to3.eval._scores import table

    textured = [row for row in scores if row["has_texture"] == "1"]
    click.echo(table(scores, {"has_texture = 1": textured} if textured else {}))
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(scores, indent=1))
