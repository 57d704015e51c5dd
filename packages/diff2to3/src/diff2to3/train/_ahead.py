"""Batches made before they are asked for: by threads from disk, and on a stream of their own."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from diff2to3.train._stage import Batch, Batches, Stage, to_device


class ReadAhead:
    """Items of batches that are read from disk, made by threads before they are asked for and moved to a device.

    Args:
        batches: make their items on the CPU.
        device: where items are wanted.
        following: the item that is asked for after an item.
        workers: threads; twice as many items are made ahead, which bounds the memory.
    """

    def __init__(self, batches: Batches, device: torch.device, following: Callable[[int], int], workers: int) -> None:
        self.batches, self.device, self.following, self.depth = batches, device, following, 2 * workers
        self.pool = ThreadPoolExecutor(workers, thread_name_prefix="read-ahead")
        self.made: dict[int, Future[Batch]] = {}

    def __getitem__(self, index: int) -> Batch:
        due = [index]
        while len(due) < self.depth:
            due.append(self.following(due[-1]))
        for stale in self.made.keys() - set(due):
            self.made.pop(stale).cancel()
        for item in due:
            if item not in self.made:
                self.made[item] = self.pool.submit(self.batches.__getitem__, item)
        return to_device(self.made.pop(index).result(), self.device)

    def close(self) -> None:
        """Stops the threads; what they are at ends."""
        self.pool.shutdown(cancel_futures=True)


class Ahead:
    """The next batch, prepared on a stream of its own while the device still works on this one.

    Sizes of sparse batches reach the host while they are made. On the main stream each such read would wait for all
    work in the queue, and the device would then wait for the host.
    """

    def __init__(self, stage: Stage, batches: Batches, device: torch.device) -> None:
        self.stage, self.batches = stage, batches
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.batch: Batch = {}
        self.used: tuple[torch.cuda.Event, Batch] | None = None

    def prepare(self, index: int) -> None:
        """Makes item ``index``; called when all work on the item taken last is in the queue."""
        if self.stream is None:
            self.batch = self._make(index)
            return
        if self.used is not None:  # memory of the item before the last is reused here: the device is done with it first
            self.used[0].wait(self.stream)
        finished = torch.cuda.Event()
        finished.record()
        self.used = finished, self.batch
        with torch.cuda.stream(self.stream):
            self.batch = self._make(index)

    def take(self) -> Batch:
        """The prepared item, on the main stream."""
        if self.stream is not None:
            torch.cuda.current_stream().wait_stream(self.stream)
        return self.batch

    def _make(self, index: int) -> Batch:
        with torch.no_grad():
            batch = self.batches[index]
            self.stage.prepare(batch)
        return batch
