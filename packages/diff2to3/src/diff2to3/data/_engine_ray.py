"""Engine ``ray``: a stage's work on the machines of a Ray cluster (extra ``scale``).

Workers read the assets by their paths, so these lie on a file system that every machine sees; the tensors come back
through Ray, and the process that runs the stage writes them.
"""

from __future__ import annotations

import logging
import pickle
import traceback
from collections import Counter, deque
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from typing import Any

from diff2to3._errors import InputError
from diff2to3.data._run import Outcome, Tensors, Workers

_ATTEMPTS = 3  # workers also die for reasons that are not the object's: a machine is taken away, memory runs short


def require_ray() -> None:
    """Raises:
    InputError: Ray is not installed.
    """
    if find_spec("ray") is None:
        raise InputError("engine 'ray' needs Ray; run `pip install 'diff2to3[scale]'`, on every machine of the cluster")


class _Worker:
    """A worker process of the cluster; does one object at a time."""

    def __init__(self, pickled: bytes) -> None:
        self.pickled = pickled  # unpickled in `run`: what goes wrong there must reach the user
        self.work: Callable[[str], Tensors] | None = None

    def run(self, object_id: str) -> tuple[Tensors | None, BaseException | None]:
        """Tensors of an object, or the error that its work raised, which is not a fault of the cluster."""
        try:
            if self.work is None:
                work, workers = pickle.loads(self.pickled)
                if workers.initializer is not None:
                    workers.initializer(*workers.initargs)
                self.work = work
            return self.work(object_id), None
        except Exception as error:
            return None, _portable(error)


def _portable(error: Exception) -> Exception:
    """The error with its traceback as a note; another of the same message if it does not survive the way back."""
    error.add_note(traceback.format_exc())
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def on_ray(work: Callable[[str], Tensors], todo: list[str], workers: Workers) -> Iterator[tuple[str, Outcome]]:
    """Outcomes as they come, from ``workers.count`` processes of the cluster, at most one a CPU, or
    one a GPU for work that needs one.

    Uses the cluster that this process is connected to, else the one that runs on this machine (``ray start``), else it
    starts one here. A worker has one object under way; when it dies, another takes its place and the object is tried
    again, up to three times in all.

    Args:
        work: like ``workers.initializer``, a function of a module that the workers can import.

    Raises:
        RuntimeError: workers die and none has ever done anything.
    """
    import ray

    started_here = not ray.is_initialized()
    if started_here:
        ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.WARNING)
    resources = ray.cluster_resources()
    gpus = int(resources.get("GPU", 0)) if workers.on_gpu else 0
    count = max(1, min(workers.count, len(todo), gpus or int(resources.get("CPU", 1))))
    try:
        yield from _on_cluster(work, todo, workers, count, ray.remote(num_cpus=1, num_gpus=min(gpus, 1)))
    finally:
        if started_here:
            ray.shutdown()


def _on_cluster(
    work: Callable[[str], Tensors], todo: list[str], workers: Workers, count: int, remote: Callable[[type], Any]
) -> Iterator[tuple[str, Outcome]]:
    import ray

    worker_class = remote(_Worker)
    pickled = ray.put(pickle.dumps((work, workers)))
    waiting, attempts = deque(todo), Counter[str]()
    running: dict[Any, tuple[str, Any]] = {}  # future -> object, worker
    deaths, answers = 0, 0

    def give(worker: Any) -> None:
        """The next object for a worker; without one it ends, and its CPU is free for a worker that waits for one."""
        if not waiting:
            ray.kill(worker)
            return
        object_id = waiting.popleft()
        attempts[object_id] += 1
        running[worker.run.remote(object_id)] = object_id, worker

    try:
        for _ in range(count):
            give(worker_class.remote(pickled))
        while running:
            [future], _ = ray.wait(list(running), num_returns=1)
            object_id, worker = running.pop(future)
            try:
                tensors, error = ray.get(future)
            except ray.exceptions.RayError as death:  # of the worker, its machine, or the one that held the result
                deaths += 1
                reason = f"{type(death).__name__}: {str(death).splitlines()[0]}"
                if not answers and deaths >= 3 * _ATTEMPTS * count:
                    raise RuntimeError(f"{deaths} Ray workers died and none did anything: {reason}") from death
                ray.kill(worker)
                if attempts[object_id] < _ATTEMPTS:
                    waiting.append(object_id)
                else:
                    yield object_id, partial(_outcome, None, RuntimeError(f"tried {_ATTEMPTS} times, {reason}"))
                if waiting:
                    give(worker_class.remote(pickled))
            else:
                answers += 1
                give(worker)
                yield object_id, partial(_outcome, tensors, error)
    finally:
        for _, worker in running.values():
            ray.kill(worker)


def _outcome(tensors: Tensors | None, error: BaseException | None) -> Tensors:
    if tensors is None:
        raise error or RuntimeError("the work returned nothing; expected a mapping of tensors")
    return tensors
