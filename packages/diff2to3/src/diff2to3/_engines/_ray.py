"""Engine ``ray``: workers on the machines of a Ray cluster (extra ``scale``).

They read their input by its paths, so it lies on a file system that every machine sees; results come back through Ray,
and the process that asked writes them.
"""

from __future__ import annotations

import logging
import pickle
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

from diff2to3._engines._spread import Answer, Worker, WorkerDied, Workers
from diff2to3._errors import InputError


def require_ray() -> None:
    """Raises:
    InputError: Ray is not installed.
    """
    if find_spec("ray") is None:
        raise InputError("engine 'ray' needs Ray; run `pip install 'diff2to3[scale]'`, on every machine of the cluster")


class RayCrew:
    """An actor for each worker, at most one a CPU, or one a GPU for work that needs one.

    Uses the cluster that this process is connected to, else the one that runs on this machine (``ray start``), else it
    starts one here.
    """

    def __init__(self, work: Callable[[Any], Any], workers: Workers, items: int) -> None:
        import ray

        self._started_here = not ray.is_initialized()
        if self._started_here:
            ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.WARNING)
        resources = ray.cluster_resources()
        gpus = int(resources.get("GPU", 0)) if workers.on_gpu else 0
        self.count = max(1, min(workers.count, items, gpus or int(resources.get("CPU", 1))))
        self._class = ray.remote(num_cpus=1, num_gpus=min(gpus, 1))(Worker)
        self._pickled = ray.put(pickle.dumps((work, workers)))
        self._futures: dict[Any, Any] = {}  # worker -> the answer that it is to give

    def start(self) -> Any:
        return self._class.remote(self._pickled)

    def give(self, worker: Any, item: Any) -> None:
        self._futures[worker] = worker.run.remote(item)

    def wait(self, workers: Sequence[Any]) -> Any:
        import ray

        of = {self._futures[worker]: worker for worker in workers}
        [future], _ = ray.wait(list(of), num_returns=1)
        return of[future]

    def answer(self, worker: Any) -> Answer:
        import ray

        try:
            answer: Answer = ray.get(self._futures.pop(worker))
            return answer
        except ray.exceptions.RayError as death:
            raise WorkerDied(f"{type(death).__name__}: {str(death).splitlines()[0]}") from death

    def end(self, worker: Any) -> None:
        import ray

        ray.kill(worker)

    def close(self) -> None:
        import ray

        for worker in self._futures:
            ray.kill(worker)
        if self._started_here:
            ray.shutdown()
