"""The pipeline stage by stage, as a stream of events that a page can show."""

from __future__ import annotations

import functools
import queue
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jaxtyping import Int
from PIL import Image
from torch import Tensor

from diff2to3._asset import Asset
from diff2to3.app._limits import Settings

if TYPE_CHECKING:
    from diff2to3._pipeline import Pipeline

#: The stages, as in `Asset.timings`.
STAGES = ("image", "features", "structure", "latents", "gaussians")


@dataclass(frozen=True)
class Progress:
    """`done` of `total` steps of a stage are over."""

    sample: int
    stage: str
    done: int
    total: int


@dataclass(frozen=True)
class Voxels:
    """Stage 1 of a sample is over: its occupied voxels (x, y, z) of a grid_size^3 grid."""

    sample: int
    coords: Int[Tensor, "l 3"]
    grid_size: int


@dataclass(frozen=True)
class Made:
    """A sample is ready."""

    sample: int
    asset: Asset


Event = Progress | Voxels | Made
Report = Callable[[Event], None]


def generate(pipeline: Pipeline, picture: Image.Image, settings: Settings) -> Iterator[Event]:
    """Make `settings.samples` objects of a picture; the events come while the work goes on.

    The work stops at its next step when the iterator is closed.
    """
    return _events(lambda report: _generate(pipeline, picture, settings, report))


def _generate(pipeline: Pipeline, picture: Image.Image, settings: Settings, report: Report) -> None:
    timings: dict[str, float] = {}

    @contextmanager
    def stage(name: str, sample: int = 0) -> Iterator[None]:
        report(Progress(sample, name, 0, 1))
        start = time.perf_counter()
        yield
        timings[name] = time.perf_counter() - start

    with stage("image"):
        cut = pipeline.cut_out(picture)
    with stage("features"):
        condition = pipeline.encode([[cut]])
    for sample in range(settings.samples):
        options: dict[str, Any] = {
            "seed": settings.seed,
            "sample": sample,
            "steps": settings.steps,
            "guidance": settings.guidance,
        }
        callback = functools.partial(_step, report, sample)
        with stage("structure", sample):
            [coords] = pipeline.find_voxels(condition, **options, callback=callback)
        report(Voxels(sample, coords, pipeline.structure.grid_size))
        with stage("latents", sample):
            latents = pipeline.fill_voxels([coords], condition, **options, callback=callback)
        with stage("gaussians", sample):
            [gaussians] = pipeline.decode(latents)
        asset = Asset(
            gaussians=gaussians,
            voxels=coords,
            pictures=(cut,),
            renderer=pipeline.renderer,
            settings=options,
            timings=dict(timings),
        )
        report(Made(sample, asset))


def _step(report: Report, sample: int, stage: str, done: int, total: int) -> None:
    report(Progress(sample, stage, done, total))


#: Of the threads that work.
THREADS = "diff2to3-app"


class _Abandoned(Exception):
    """Nobody wants to hear more."""


def _events(work: Callable[[Report], None]) -> Iterator[Event]:
    """What `work` reports, as it reports it: it runs in a thread of its own."""
    events: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
    abandoned = threading.Event()

    def report(event: Event) -> None:
        if abandoned.is_set():
            raise _Abandoned
        events.put(event)

    with ThreadPoolExecutor(1, THREADS) as pool:
        future = pool.submit(work, report)
        future.add_done_callback(lambda _: events.put(None))
        try:
            while (event := events.get()) is not None:
                yield event
            future.result()  # raises what the work raised
        finally:
            abandoned.set()
