"""Engine ``local``: processes of this machine."""

from __future__ import annotations

import os
import pickle
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any

from diff2to3._engines._spread import Answer, Worker, WorkerDied, Workers

_SECONDS_TO_END = 10.0  # then it is killed


@dataclass(frozen=True, eq=False)
class _Process:
    number: int
    process: SpawnProcess
    connection: Connection


class LocalCrew:
    """A process for each worker, with a pipe. A process ends when the other end of its pipe is gone, so it outlives a
    killed parent by one item at most."""

    def __init__(self, work: Callable[[Any], Any], workers: Workers, items: int) -> None:
        self.count = min(workers.count, items)
        self._pickled = pickle.dumps((work, workers))
        self._on_gpu = workers.on_gpu
        self._running: dict[int, _Process] = {}

    def start(self) -> _Process:
        number = next(n for n in range(self.count) if n not in self._running)
        context = get_context("spawn")  # forking a process that holds OpenGL or CUDA state is not safe
        here, there = context.Pipe()
        threads = max(1, (os.cpu_count() or 1) // self.count)
        arguments = (there, self._pickled, threads, number if self._on_gpu else None)
        process = context.Process(target=_serve, args=arguments, daemon=True)
        process.start()
        there.close()
        worker = self._running[number] = _Process(number, process, here)
        return worker

    def give(self, worker: _Process, item: Any) -> None:
        with suppress(OSError):  # it is dead already, which `answer` tells
            worker.connection.send(item)

    def wait(self, workers: Sequence[_Process]) -> _Process:
        ready = wait([worker.connection for worker in workers])
        return next(worker for worker in workers if worker.connection in ready)

    def answer(self, worker: _Process) -> Answer:
        try:
            answer: Answer = worker.connection.recv()
            return answer
        except (EOFError, OSError):
            worker.process.join()
            code = worker.process.exitcode or 0
            how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            raise WorkerDied(f"its worker process died ({how})") from None

    def end(self, worker: _Process) -> None:
        worker.connection.close()
        del self._running[worker.number]
        _join(worker.process)

    def close(self) -> None:
        for worker in self._running.values():
            worker.process.terminate()
        for worker in list(self._running.values()):
            self.end(worker)


def _join(process: SpawnProcess) -> None:
    process.join(_SECONDS_TO_END)
    if process.is_alive():
        process.kill()
        process.join()


def _serve(connection: Connection, pickled: bytes, threads: int, gpu: int | None) -> None:
    """A worker process: an answer for each item, until the pipe is closed."""
    for name in ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS"):  # PyTorch and Numba read them when they are imported
        os.environ.setdefault(name, str(threads))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the parent decides
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # unwinds: temporary files go
    if gpu is not None:
        _take_gpu(gpu)
    worker = Worker(pickled)
    try:
        while True:
            connection.send(worker.run(connection.recv()))
    except (EOFError, OSError):
        return


def _take_gpu(number: int) -> None:
    """Make one of the GPUs, dealt out in turn, the one that ``cuda`` means in this process."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.set_device(number % torch.cuda.device_count())
