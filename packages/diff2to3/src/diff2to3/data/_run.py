"""Running one stage over many objects: resumable, in worker processes, with failures recorded instead of raised.

Where the work is done is an engine's matter: processes of this machine here, a Ray cluster in ``_engine_ray``. An
engine yields one outcome an object, in any order; objects under way when a worker dies are tried again, so that none is
lost and none comes twice. Files and the manifest are written by this process alone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

import numpy as np

from diff2to3._progress import track
from diff2to3.data._store import Store

Tensors = Mapping[str, np.ndarray]
Outcome = Callable[[], Tensors]  # the tensors of an object, or the exception that its work raised


@dataclass(frozen=True)
class Workers:
    """``count`` processes (0: work in this one); each calls ``initializer(*initargs)`` once.

    On a cluster that has GPUs, each has one for itself if the work is ``on_gpu``.
    """

    count: int = 0
    initializer: Callable[..., None] | None = None
    initargs: tuple[Any, ...] = ()
    on_gpu: bool = False


Engine = Callable[[Callable[[str], Tensors], list[str], Workers], Iterator[tuple[str, Outcome]]]


@contextmanager
def using_engine(name: str) -> Iterator[None]:
    """Stages that use worker processes run them on this engine: ``local`` or ``ray``.

    Raises:
        InputError: Ray is not installed.
    """
    if name == "ray":
        from diff2to3.data._engine_ray import on_ray, require_ray

        require_ray()
        token = _engine.set(on_ray)
    else:
        token = _engine.set(in_processes)
    try:
        yield
    finally:
        _engine.reset(token)


def run_stage(
    store: Store,
    stage: str,
    ids: list[str],
    work: Callable[[str], Tensors],
    settings: Mapping[str, Any],
    workers: Workers | None = None,
) -> dict[str, str]:
    """Runs ``work(object id) -> tensors`` for every object that lacks this stage; a failure is recorded, not fatal.

    An object whose file was made with the same ``settings`` is left alone, so a run that was stopped goes on where it
    was, and a finished one does nothing.

    Returns:
        Reason per failed object; it also stands in the stage's manifest.
    """
    workers = workers or Workers()
    done = store.finished(stage, settings, ids)
    todo = [i for i in dict.fromkeys(ids) if i not in done]
    failures: dict[str, str] = {}
    outcomes = _engine.get()(work, todo, workers) if workers.count and todo else _here(work, todo, workers)
    for object_id, outcome in track(outcomes, stage, total=len(todo)):
        try:
            tensors = outcome()
        except (ValueError, RuntimeError) as error:
            failures[object_id] = f"{type(error).__name__}: {' '.join(str(error).split())}"
        else:
            done[object_id] = store.write(stage, object_id, tensors, settings)
    store.write_manifest(stage, settings, done, failures)
    return failures


def _here(work: Callable[[str], Tensors], todo: list[str], workers: Workers) -> Iterator[tuple[str, Outcome]]:
    if workers.initializer is not None:
        workers.initializer(*workers.initargs)
    for object_id in todo:
        yield object_id, lambda object_id=object_id: work(object_id)  # type: ignore[misc]


def in_processes(work: Callable[[str], Tensors], todo: list[str], workers: Workers) -> Iterator[tuple[str, Outcome]]:
    """Engine ``local``: outcomes as they come.

    A process that dies takes its pool along: the objects under way are then tried alone.
    """
    waiting, suspects = deque(todo), deque[str]()
    count = min(workers.count, len(todo))
    while waiting or suspects:
        queue, in_flight = (waiting, 2 * count) if waiting else (suspects, 1)
        for object_id, future in _one_pool(work, queue, in_flight, min(count, in_flight), workers):
            if in_flight > 1 and isinstance(future.exception(), BrokenProcessPool):
                suspects.append(object_id)
            else:
                yield object_id, future.result


def _one_pool(
    work: Callable[[str], Tensors], queue: deque[str], in_flight: int, count: int, workers: Workers
) -> Iterator[tuple[str, Future[Tensors]]]:
    """Works through the queue until it is empty or the pool breaks."""
    context = get_context("spawn")  # forking a process that holds OpenGL or CUDA state is not safe
    with ProcessPoolExecutor(
        count, mp_context=context, initializer=workers.initializer, initargs=workers.initargs
    ) as pool:
        running: dict[Future[Tensors], str] = {}
        broken = False
        while running or (queue and not broken):
            while queue and len(running) < in_flight and not broken:
                try:
                    running[pool.submit(work, queue[0])] = queue[0]
                    queue.popleft()
                except BrokenProcessPool:
                    broken = True
            finished, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in finished:
                broken = broken or isinstance(future.exception(), BrokenProcessPool)
                yield running.pop(future), future


_engine: ContextVar[Engine] = ContextVar("engine", default=in_processes)
