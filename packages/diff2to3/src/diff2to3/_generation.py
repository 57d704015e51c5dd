"""The objects of one call of ``generate``: made here or by many workers, and written by this process alone.

Whoever makes an object, a `Maker` does it, so that the files are the same. A finished object is left alone, so that a
run that was stopped goes on where it was.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diff2to3._atomic import staging, writing
from diff2to3._engines import Workers, outcomes, using_engine
from diff2to3._errors import InputError, OutputError
from diff2to3._locate import file_sha256
from diff2to3._progress import Bars, progress

if TYPE_CHECKING:
    from diff2to3._manifest import Manifest


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
    engine: str
    workers: int
    threads: int | None
    overwrite: bool


@dataclass(frozen=True)
class Item:
    """An object to make, and how its files are called."""

    name: str
    pictures: tuple[str, ...]
    sample: int

    def files(self, formats: Sequence[str]) -> dict[str, str]:
        """Format -> file."""
        return {suffix: f"{self.name}.{suffix}" for suffix in formats}


@dataclass(frozen=True)
class Made:
    """An object's manifest and its files by name; None where it was finished before."""

    manifest: Manifest
    files: dict[str, bytes] | None


def items(job: Job) -> list[Item]:
    """The objects of a job: one for each entry and sample, called after its first picture.

    Where several have one name, on a file system that does not tell a from A either, they are numbered.
    """
    taken: set[str] = set()
    found = []
    for pictures in job.objects:
        name = stem = Path(pictures[0]).stem
        number = 1
        while name.casefold() in taken:
            number += 1
            name = f"{stem}-{number}"
        taken.add(name.casefold())
        for sample in job.samples:
            found.append(Item(name if len(job.samples) == 1 else f"{name}-{sample}", pictures, sample))
    return found


def run(job: Job, manifest: Manifest | None, bars: Bars) -> Iterator[tuple[Item, dict[str, Any] | Exception]]:
    """Every object as soon as it is done: its manifest with the paths of its files, or why it failed.

    Args:
        job: what to do.
        manifest: the one that it repeats, whose weights it has to have.
        bars: show what goes on.

    Raises:
        OutputError: a file cannot be written.
        Exception: the pipeline cannot be loaded, or the only object of the job failed.
    """
    todo = items(job)
    work: Any = make
    workers = Workers(job.workers, start, (job, manifest, os.getcwd()), on_gpu=(job.device or "cuda") == "cuda")
    if not job.workers:
        work, workers = Maker(job, manifest, bars), Workers()
    with (
        using_engine(job.engine),
        closing(outcomes(work, todo, workers)) as found,
        bars.counting(len(todo)) as count,
    ):
        for item, outcome in found:
            try:
                made: Made = outcome()
            except OutputError:
                raise
            except (ValueError, RuntimeError, OSError) as error:
                if len(todo) == 1:
                    raise
                yield item, error
            else:
                if made.files is not None:
                    _write(job.out, made.manifest, made.files)
                yield item, _result(job, made)
            count()


class Maker:
    """Makes the objects of a job, with a pipeline that is loaded once."""

    def __init__(self, job: Job, manifest: Manifest | None, bars: Bars) -> None:
        self.job, self.bars = job, bars
        begin = time.perf_counter()
        with bars.step("loading"):
            import torch

            from diff2to3._manifest import describe
            from diff2to3._pipeline import Pipeline

            if job.threads is not None:
                torch.set_num_threads(job.threads)
            options: dict[str, Any] = {name: getattr(job, name) for name in ("device", "dtype", "low_vram", "revision")}
            self.pipeline = Pipeline.from_pretrained(job.pipeline, **options | job.components)
        self.facts = describe(self.pipeline)
        if manifest is not None:
            _check_same_pipeline(manifest, self.facts, job)
        self.loading = time.perf_counter() - begin

    def __call__(self, item: Item) -> Made:
        """Make an object, unless it is finished."""
        from diff2to3._manifest import Manifest, finished

        job, recipe = self.job, self._recipe(item)
        if not job.overwrite and (before := finished(job.out / f"{item.name}.json", recipe)):
            return Made(before, None)
        try:
            asset = self.pipeline(
                list(item.pictures),
                seed=job.seed,
                sample=item.sample,
                steps=job.steps,
                guidance=job.guidance,
                callback=self.bars.callback(item.name),
            )
        except InputError as error:
            raise type(error)(_naming(item.pictures, str(error))) from error
        timings = {"loading": self.loading, **asset.timings}
        files = {}
        with tempfile.TemporaryDirectory(prefix="diff2to3-") as folder, writing(Path(folder)):
            for suffix, file in recipe["files"].items():
                begin = time.perf_counter()
                with self.bars.step(f"{item.name}: writing {suffix}"):
                    files[file] = asset.save(Path(folder) / file).read_bytes()
                timings[suffix] = time.perf_counter() - begin
        manifest = Manifest(
            **recipe,
            num_voxels=len(asset.voxels),
            num_gaussians=len(asset.gaussians),
            timings={stage: round(seconds, 4) for stage, seconds in timings.items()},
        )
        return Made(manifest, files)

    def _recipe(self, item: Item) -> dict[str, Any]:
        """All of the manifest that is known before."""
        from diff2to3._manifest import PictureRecord

        job = self.job
        return {
            "name": item.name,
            "pictures": tuple(PictureRecord(path=path, sha256=file_sha256(Path(path))) for path in item.pictures),
            "pipeline": job.pipeline,
            "components": job.components,
            "seed": job.seed,
            "sample": item.sample,
            "steps": job.steps,
            "guidance": job.guidance,
            "files": item.files(job.formats),
            **self.facts,
        }


_maker: list[Maker] = []


def start(job: Job, manifest: Manifest | None, folder: str) -> None:
    """What a worker process begins with; paths are as seen from `folder`."""
    from diff2to3._cli import speak_plainly

    speak_plainly()
    os.chdir(folder)
    with progress(visible=False) as bars:
        _maker[:] = [Maker(job, manifest, bars)]


def make(item: Item) -> Made:
    """An object, by the maker that `start` made in this worker process."""
    return _maker[0](item)


def _write(out: Path, manifest: Manifest, files: dict[str, bytes]) -> None:
    last = f"{manifest.name}.json"
    text = json.dumps(manifest.model_dump(mode="json"), indent=2) + "\n"
    with writing(out / manifest.name), staging(out, manifest.name, last) as folder:
        for name, content in (files | {last: text.encode()}).items():
            (folder / name).write_bytes(content)


def _result(job: Job, made: Made) -> dict[str, Any]:
    files = made.manifest.files | {"json": f"{made.manifest.name}.json"}
    return {**made.manifest.model_dump(mode="json"), "files": {key: str(job.out / file) for key, file in files.items()}}


def _check_same_pipeline(manifest: Manifest, facts: dict[str, Any], job: Job) -> None:
    asked = (job.components, job.pipeline, job.revision)
    if asked != (manifest.components, manifest.pipeline, manifest.revision):
        return  # another pipeline was asked for
    if other := [key for key, value in facts["config"].items() if manifest.config.get(key) != value]:
        raise InputError(f"the pipeline's {', '.join(other)} is not as in the manifest; the result would differ")
    found = facts["weights"]
    roles = sorted(manifest.weights.keys() | found)
    if other := [role for role in roles if manifest.weights.get(role) != found.get(role)]:
        raise InputError(f"the weights of {', '.join(other)} are not those of the manifest; the result would differ")


def _naming(pictures: Sequence[str], message: str) -> str:
    return message if any(path in message for path in pictures) else f"{', '.join(pictures)}: {message}"
