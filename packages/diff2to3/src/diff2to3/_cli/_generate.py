"""``diff2to3 generate``: pictures in, splat files, pictures, a video and a manifest out."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from diff2to3._atomic import output_folder
from diff2to3._errors import InputError

if TYPE_CHECKING:
    from diff2to3._asset import Asset
    from diff2to3._manifest import Manifest
    from diff2to3._pipeline import Callback, Pipeline

DEFAULT_FORMATS = "ply,png,mp4,html"


@dataclass(frozen=True)
class Job:
    """What one call of ``generate`` is asked to do; each object is a tuple of pictures of it."""

    objects: tuple[tuple[str, ...], ...]
    out: Path
    formats: tuple[str, ...]
    pipeline: str | None
    revision: str | None
    components: dict[str, str]
    seed: int
    samples: tuple[int, ...]
    steps: int | None
    guidance: float | None
    device: str | None
    dtype: str
    low_vram: bool


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
    """Make 3D Gaussians from pictures of single objects.

    Writes for each picture NAME.ply, NAME.png (views), NAME.mp4 (turntable), NAME.html (viewer), NAME.json (manifest).
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
    _check_before_loading(job)
    with output_folder(job.out):
        for result in _run(job, manifest):
            click.echo(json.dumps(result) if as_json else _summary(result, job.out))


def _job(images: tuple[str, ...], given: dict[str, Any]) -> Job:
    roles = ("matting", "feature_extractor", "structure", "backbone", "latent_decoder", "renderer")
    suffixes = [part.strip(" .").lower() for part in given["formats"].split(",")]
    return Job(
        objects=(images,) if given["multi_view"] and images else tuple((image,) for image in images),
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
    )


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


def _check_before_loading(job: Job) -> None:
    """Refuse what can be refused without loading PyTorch: names of components, formats, the pipeline, pictures."""
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
    for path in (path for pictures in job.objects for path in pictures):
        picture = read_image(path)
        if picture.mode == "RGBA":
            try:
                alpha_box(as_rgba_array(picture)[..., 3])
            except ValueError as error:
                raise ImageInputError(f"{path}: {error}") from error


def _run(job: Job, manifest: Manifest | None) -> Iterator[dict[str, Any]]:
    """Load the pipeline, make every object, and yield each result once its files are in place."""
    with _progress() as bars:
        start = time.perf_counter()
        with bars.step("loading"):
            from diff2to3._pipeline import Pipeline

            options: dict[str, Any] = {name: getattr(job, name) for name in ("device", "dtype", "low_vram", "revision")}
            pipeline = Pipeline.from_pretrained(job.pipeline, **options | job.components)
        if manifest is not None:
            _check_same_pipeline(manifest, pipeline, job)
        loading = time.perf_counter() - start
        for pictures, name in zip(job.objects, _names(job.objects), strict=True):
            for sample in job.samples:
                full_name = name if len(job.samples) == 1 else f"{name}-{sample}"
                callback = bars.callback(full_name)
                try:
                    asset = pipeline(
                        list(pictures),
                        seed=job.seed,
                        sample=sample,
                        steps=job.steps,
                        guidance=job.guidance,
                        callback=callback,
                    )
                except InputError as error:
                    raise type(error)(_naming(pictures, str(error))) from error
                yield _write(asset, pipeline, job, full_name, pictures, loading, bars)


def _write(
    asset: Asset, pipeline: Pipeline, job: Job, name: str, pictures: Sequence[str], loading: float, bars: _Bars
) -> dict[str, Any]:
    """Write all files of one asset, at once; return its manifest with the paths of the files."""
    from diff2to3._atomic import staging, writing
    from diff2to3._locate import file_sha256
    from diff2to3._manifest import Manifest, PictureRecord, describe

    timings = {"loading": loading, **asset.timings}
    files = {suffix: f"{name}.{suffix}" for suffix in job.formats}
    with writing(job.out / name), staging(job.out, name) as folder:
        for suffix, file in files.items():
            start = time.perf_counter()
            with bars.step(f"{name}: writing {suffix}"):
                asset.save(folder / file)
            timings[suffix] = time.perf_counter() - start
        manifest = Manifest(
            name=name,
            pictures=tuple(PictureRecord(path=path, sha256=file_sha256(Path(path))) for path in pictures),
            pipeline=job.pipeline,
            components=job.components,
            timings={stage: round(seconds, 4) for stage, seconds in timings.items()},
            files=files,
            **describe(asset, pipeline),
        )
        text = json.dumps(manifest.model_dump(mode="json"), indent=2) + "\n"
        (folder / f"{name}.json").write_text(text, encoding="utf-8")
    paths = {suffix: str(job.out / file) for suffix, file in files.items()}
    return {**manifest.model_dump(mode="json"), "files": {**paths, "json": str(job.out / f"{name}.json")}}


def _check_same_pipeline(manifest: Manifest, pipeline: Pipeline, job: Job) -> None:
    asked = (job.components, job.pipeline, job.revision)
    if asked != (manifest.components, manifest.pipeline, manifest.revision):
        return  # another pipeline was asked for
    settings = pipeline.config.model_dump(mode="json", exclude={"weights"})
    if other := [key for key, value in settings.items() if manifest.config.get(key) != value]:
        raise InputError(f"the pipeline's {', '.join(other)} is not as in the manifest; the result would differ")
    found = pipeline.weight_hashes()
    roles = sorted(manifest.weights.keys() | found)
    if other := [role for role in roles if manifest.weights.get(role) != found.get(role)]:
        raise InputError(f"the weights of {', '.join(other)} are not those of the manifest; the result would differ")


def _names(objects: Sequence[Sequence[str]]) -> list[str]:
    """A file name for each object: its first picture's, numbered where several are the same."""
    names: list[str] = []
    for pictures in objects:
        stem, number = Path(pictures[0]).stem, 1
        name = stem
        while name in names:
            number += 1
            name = f"{stem}-{number}"
        names.append(name)
    return names


def _naming(pictures: Sequence[str], message: str) -> str:
    return message if any(path in message for path in pictures) else f"{', '.join(pictures)}: {message}"


def _summary(result: dict[str, Any], out: Path) -> str:
    seconds = sum(value for stage, value in result["timings"].items() if stage != "loading")
    files = " ".join(Path(path).name for path in result["files"].values())
    return f"{result['name']}: {result['num_gaussians']:,} Gaussians in {seconds:.1f} s -> {out}: {files}"


class _Bars:
    """Progress on stderr: a bar for each stage of the work."""

    def __init__(self, progress: Any) -> None:
        self._progress = progress

    @contextmanager
    def step(self, description: str) -> Iterator[None]:
        """A pulsing line while something without known length goes on."""
        task = self._progress.add_task(description, total=None)
        try:
            yield
        finally:
            self._progress.remove_task(task)

    def callback(self, name: str) -> Callback:
        """A callback for `Pipeline` that shows the stages of the object `name`."""
        tasks: dict[str, Any] = {}

        def report(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = self._progress.add_task(f"{name}: {stage}", total=total)
            self._progress.update(tasks[stage], completed=done, total=total)

        return report


@contextmanager
def _progress() -> Iterator[_Bars]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    # stdout carries results and may be a pipe while stderr is a terminal: rich must not take it over
    progress = Progress(*columns, console=Console(stderr=True), redirect_stdout=False)
    progress.start()
    try:
        yield _Bars(progress)
    except BaseException:
        progress.live.transient = True  # leave nothing but the error's own line
        progress.live.stop()
        raise
    progress.stop()
