"""``diff2to3 generate``: pictures in, splat files, pictures, a video and a manifest out."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from diff2to3._atomic import output_folder
from diff2to3._errors import InputError
from diff2to3._generation import Item, Job, items, run
from diff2to3._progress import progress

if TYPE_CHECKING:
    from diff2to3._manifest import Manifest

DEFAULT_FORMATS = "ply,png,mp4,html"
#: What is taken for a picture in a folder.
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif")


@click.command()
@click.argument("images", nargs=-1, metavar="IMAGE...")
@click.option("-o", "--out", default="out", show_default=True, metavar="DIR", help="Output folder.")
@click.option("--pipeline", metavar="NAME|DIR|HUB", help="Pipeline to use.  [default: the embedded one]")
@click.option("--revision", metavar="REV", help="Branch, tag or commit of a pipeline from the Hub.")
@click.option("--format", "formats", default=DEFAULT_FORMATS, show_default=True, help="Files to write, by suffix.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0, 2**63 - 1))
@click.option("--samples", default=1, show_default=True, type=click.IntRange(1), help="Variants of each object.")
@click.option("--steps", type=click.IntRange(1), help="Sampling steps of both stages.  [default: the pipeline's]")
@click.option("--guidance", type=click.FloatRange(0), help="Guidance of both stages.  [default: the pipeline's]")
@click.option("--device", metavar="D", help="cpu, cuda, cuda:1, mps ...  [default: a GPU if there is one]")
@click.option("--dtype", default="float32", show_default=True, type=click.Choice(["float32", "float16", "bfloat16"]))
@click.option("--low-vram", is_flag=True, help="Keep on the device only the model that is at work.")
@click.option("--multi-view", is_flag=True, help="All pictures show the same object.")
@click.option("--overwrite", is_flag=True, help="Make again what is finished.")
@click.option(
    "--engine",
    type=click.Choice(["local", "ray"]),
    default="local",
    show_default=True,
    help="Where the workers are: on this machine, or on a Ray cluster (extra `scale`).",
)
@click.option(
    "--workers", type=click.IntRange(1), help="Processes.  [default: local has this one, ray one a CPU or GPU]"
)
@click.option(
    "--threads",
    type=click.IntRange(1),
    help="CPU threads of a process; only the same number gives the same bytes.  [default: the cores, shared out]",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object a result on stdout.")
@click.option("--matting", metavar="NAME", help="Component that removes the background.")
@click.option("--feature-extractor", metavar="NAME", help="Component that makes the condition features.")
@click.option("--structure", metavar="NAME", help="Component that finds the occupied voxels.")
@click.option("--backbone", metavar="NAME", help="Component that generates the latents.")
@click.option("--latent-decoder", metavar="NAME", help="Component that turns latents into Gaussians.")
@click.option("--renderer", metavar="NAME", help="Component that draws.")
@click.option("--from-manifest", metavar="FILE.json", help="Make again what a manifest describes; options override it.")
@click.pass_context
def generate(
    ctx: click.Context, images: tuple[str, ...], as_json: bool, from_manifest: str | None, **given: Any
) -> None:
    """Make 3D Gaussians from pictures of single objects; a folder stands for all pictures in it.

    Writes for each picture NAME.ply, NAME.png (views), NAME.mp4 (turntable), NAME.html (viewer), NAME.json (manifest).
    What is finished, with the same picture, settings and weights, is left alone: a run that was stopped goes on. Of
    several objects, those that fail are listed at the end.
    """
    manifest = None
    if from_manifest is not None:
        from diff2to3._manifest import other_versions, read_manifest

        manifest = read_manifest(Path(from_manifest))
        if (others := other_versions(manifest)) is not None:
            click.echo(f"diff2to3: the result may differ a little: {from_manifest} was made with {others}", err=True)
    job = _job(images, given)
    if manifest is not None:
        explicit = {name for name in given if ctx.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE}
        job = _like(manifest, Path(from_manifest or "").parent, job, explicit, bool(images))
    if not job.objects:
        raise click.UsageError("no picture given; expected one or more IMAGE paths")
    _check_before_loading(job, [path for path in images if not Path(path).is_dir()])
    _check_outputs(job, [Path(path) for path in images if Path(path).is_dir()])
    failures = []
    with output_folder(job.out):
        with progress() as bars:
            for item, result in run(job, manifest, bars):
                if isinstance(result, Exception):
                    failures.append((item, result))
                else:
                    click.echo(json.dumps(result) if as_json else _summary(result, job.out))
        if failures:
            _tell(failures, len(items(job)))


def _job(images: tuple[str, ...], given: dict[str, Any]) -> Job:
    roles = ("matting", "feature_extractor", "structure", "backbone", "latent_decoder", "renderer")
    suffixes = [part.strip(" .").lower() for part in given["formats"].split(",")]
    pictures = tuple(picture for path in images for picture in (_pictures(path) if Path(path).is_dir() else [path]))
    everywhere = sys.maxsize if given["engine"] == "ray" else 0
    return Job(
        objects=(pictures,) if given["multi_view"] and pictures else tuple((picture,) for picture in pictures),
        out=Path(given["out"]),
        formats=tuple(dict.fromkeys(suffix for suffix in suffixes if suffix)),
        pipeline=given["pipeline"],
        revision=given["revision"],
        components={role: given[role] for role in roles if given[role] is not None},
        seed=given["seed"],
        samples=tuple(range(given["samples"])),
        steps=given["steps"],
        guidance=given["guidance"],
        device=given["device"],
        dtype=given["dtype"],
        low_vram=given["low_vram"],
        engine=given["engine"],
        workers=given["workers"] or everywhere,
        threads=given["threads"],
        overwrite=given["overwrite"],
    )


def _pictures(folder: str) -> list[str]:
    """The pictures in a folder, by name; hidden ones and those of its folders do not count."""
    found = [path for path in Path(folder).iterdir() if path.suffix.lower() in PICTURES and path.name[0] != "."]
    if not found:
        raise InputError(f"{folder} is a folder without pictures; expected files that end in {', '.join(PICTURES)}")
    return [str(path) for path in sorted(found) if path.is_file()]


def _like(manifest: Manifest, folder: Path, job: Job, explicit: set[str], own_pictures: bool) -> Job:
    """The settings of a manifest in a folder, where the command line says nothing else."""
    from diff2to3._manifest import find_picture

    changes: dict[str, Any] = {
        name: getattr(manifest, name)
        for name in ("pipeline", "seed", "steps", "guidance", "dtype", "device")
        if name not in explicit
    }
    if not explicit & {"pipeline", "revision"}:
        changes["revision"] = manifest.revision
    if not explicit & {"samples", "seed"}:
        changes["samples"] = (manifest.sample,)
    if "formats" not in explicit:
        changes["formats"] = tuple(manifest.files)
    if not own_pictures:
        changes["objects"] = (tuple(find_picture(picture, folder) for picture in manifest.pictures),)
    return replace(job, **changes, components={**manifest.components, **job.components})


def _check_before_loading(job: Job, pictures: list[str]) -> None:
    """Refuse what can be refused without loading PyTorch: names of components, formats, the pipeline, and pictures
    that were given by name (those of a folder fail one by one).
    """
    from diff2to3._errors import ImageInputError
    from diff2to3._image import alpha_box, as_rgba_array
    from diff2to3._inputs import read_image
    from diff2to3._locate import locate
    from diff2to3._plugins import EXPORTER, registry

    if not job.formats:
        raise InputError(f"--format is empty; expected for example {DEFAULT_FORMATS}")
    for role, name in [*job.components.items(), *((EXPORTER.name, suffix) for suffix in job.formats)]:
        registry().find(role, name)
    locate(job.pipeline, job.revision)
    for path in pictures:
        picture = read_image(path)
        if picture.mode == "RGBA":
            try:
                alpha_box(as_rgba_array(picture)[..., 3])
            except ValueError as error:
                raise ImageInputError(f"{path}: {error}") from error


def _check_outputs(job: Job, folders: list[Path]) -> None:
    """Refuse a job of which a file would replace another one of it, or one of its pictures."""
    if any(f".{suffix}" in PICTURES for suffix in job.formats) and any(
        job.out.resolve() == folder.resolve() for folder in folders
    ):
        raise InputError(
            f"the output folder {job.out} is the one of the pictures: the pictures of the results would be taken for "
            "more of them; expected another folder (-o DIR), or --format ply"
        )
    inputs = {Path(path).resolve(): path for pictures in job.objects for path in pictures}
    owners: dict[str, Item] = {}
    for item in items(job):
        for file in [*item.files(job.formats).values(), f"{item.name}.json"]:
            if (path := inputs.get((job.out / file).resolve())) is not None:
                raise InputError(f"{job.out / file} would replace the picture {path}; expected another folder (-o DIR)")
            if (other := owners.setdefault(file.casefold(), item)) is not item:
                raise InputError(
                    f"{file} would be a file of {item.pictures[0]} and of {other.pictures[0]}; rename one of them"
                )


def _tell(failures: list[tuple[Item, Exception]], total: int) -> None:
    """List what failed and leave with exit code 2, or 1 if something was no fault of the input."""
    for item, error in failures:
        reason = " ".join(str(error).split())
        kind = "" if isinstance(error, InputError) else f"{type(error).__name__}: "
        click.echo(f"diff2to3: failed: {item.name} ({', '.join(item.pictures)}): {kind}{reason}", err=True)
    message = f"{len(failures)} of {total} objects failed; the others are done"
    if all(isinstance(error, InputError) for _, error in failures):
        raise InputError(message)
    click.echo(f"diff2to3: error: {message}", err=True)
    raise click.exceptions.Exit(1)


def _summary(result: dict[str, Any], out: Path) -> str:
    seconds = sum(value for stage, value in result["timings"].items() if stage != "loading")
    files = " ".join(Path(path).name for path in result["files"].values())
    return f"{result['name']}: {result['num_gaussians']:,} Gaussians in {seconds:.1f} s -> {out}: {files}"
