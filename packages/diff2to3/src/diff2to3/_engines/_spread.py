"""Dealing items out to workers that may die."""

from __future__ import annotations

import pickle
import traceback
from collections import Counter, deque
from collections.abc import Callable, Generator, Hashable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

Outcome = Callable[[], Any]  # the result for an item, or the exception that its work raised
ATTEMPTS = 3  # workers also die for reasons that are not the item's: a machine is taken away, memory runs short


@dataclass(frozen=True)
class Workers:
    """``count`` processes (0: work in this one); each calls ``initializer(*initargs)`` once.

    Each has a GPU for itself, as far as there are enough, if the work is ``on_gpu``.
    """

    count: int = 0
    initializer: Callable[..., None] | None = None
    initargs: tuple[Any, ...] = ()
    on_gpu: bool = False


@dataclass(frozen=True)
class Answer:
    """What a worker gives back; an error ``in_start`` is the worker's, and every other one would have it too."""

    result: Any = None
    error: Exception | None = None
    in_start: bool = False


class WorkerDied(Exception):
    """A worker, its machine, or the one that held its answer is gone."""


class Crew(Protocol):
    """Worker processes of one kind, known by handles; ``count`` may be at work at once."""

    count: int

    def start(self) -> Any:
        """Another worker."""

    def give(self, worker: Any, item: Any) -> None:
        """Have a worker begin with an item."""

    def wait(self, workers: Sequence[Any]) -> Any:
        """The first of these workers that has an answer or is dead."""

    def answer(self, worker: Any) -> Answer:
        """What it has to say; raises `WorkerDied`."""

    def end(self, worker: Any) -> None:
        """Have it end, whatever it does."""

    def close(self) -> None:
        """Have all end."""


Engine = Callable[[Callable[[Any], Any], Workers, int], Crew]  # (work, workers, number of items) -> its crew


@contextmanager
def using_engine(name: str) -> Iterator[None]:
    """Work that is spread over worker processes is done on this engine: ``local`` or ``ray``.

    Raises:
        InputError: Ray is not installed.
    """
    if name == "ray":
        from diff2to3._engines._ray import RayCrew, require_ray

        require_ray()
        token = _engine.set(RayCrew)
    else:
        token = _engine.set(_local)
    try:
        yield
    finally:
        _engine.reset(token)


def _local(work: Callable[[Any], Any], workers: Workers, items: int) -> Crew:
    from diff2to3._engines._local import LocalCrew

    return LocalCrew(work, workers, items)


_engine: ContextVar[Engine] = ContextVar("engine", default=_local)


def outcomes(
    work: Callable[[Any], Any], todo: Sequence[Hashable], workers: Workers
) -> Generator[tuple[Any, Outcome], None, None]:
    """(item, outcome) as they come, each item once, in any order.

    To be closed by whoever does not use it up, so that the workers end.

    Args:
        work: called with each item; like ``workers.initializer``, a function of a module that workers can import.
        todo: different items, which can be pickled.
        workers: how many, and what they begin with.

    Raises:
        RuntimeError: workers die and none has ever done anything.
        Exception: what the initializer raised.
    """
    if not todo:
        return
    if not workers.count:
        if workers.initializer is not None:
            workers.initializer(*workers.initargs)
        for item in todo:
            yield item, partial(work, item)
        return
    crew = _engine.get()(work, workers, len(todo))
    try:
        yield from _spread(crew, todo)
    finally:
        crew.close()


def _spread(crew: Crew, todo: Sequence[Hashable]) -> Iterator[tuple[Any, Outcome]]:
    waiting, attempts = deque(todo), Counter[Hashable]()
    under_way: dict[Any, Hashable] = {}
    deaths, answers = 0, 0

    def give(worker: Any) -> None:
        """The next item for a worker; without one it ends, and its place is free for one that waits for it."""
        if not waiting:
            crew.end(worker)
            return
        item = waiting.popleft()
        attempts[item] += 1
        under_way[worker] = item
        crew.give(worker, item)

    for _ in range(min(crew.count, len(todo))):
        give(crew.start())
    while under_way:
        worker = crew.wait(list(under_way))
        item = under_way.pop(worker)
        try:
            answer = crew.answer(worker)
        except WorkerDied as death:
            deaths += 1
            if not answers and deaths >= 3 * ATTEMPTS * crew.count:
                raise RuntimeError(f"{deaths} workers died and none did anything: {death}") from death
            crew.end(worker)
            if attempts[item] < ATTEMPTS:
                waiting.append(item)
            else:
                yield item, partial(_outcome, Answer(error=RuntimeError(f"tried {ATTEMPTS} times, {death}")))
            if waiting:
                give(crew.start())
            continue
        if answer.in_start and answer.error is not None:
            raise answer.error
        answers += 1
        give(worker)
        yield item, partial(_outcome, answer)


def _outcome(answer: Answer) -> Any:
    if answer.error is not None:
        raise answer.error
    return answer.result


class Worker:
    """What a worker process does, given the pickled (work, workers)."""

    def __init__(self, pickled: bytes) -> None:
        self.pickled = pickled  # unpickled in `run`: what goes wrong there must reach the user
        self.work: Callable[[Any], Any] | None = None

    def run(self, item: Any) -> Answer:
        """The work on an item; errors come back, for they are no fault of the engine."""
        try:
            if self.work is None:
                work, workers = pickle.loads(self.pickled)
                if workers.initializer is not None:
                    workers.initializer(*workers.initargs)
                self.work = work
        except Exception as error:
            return Answer(error=_portable(error), in_start=True)
        try:
            return Answer(self.work(item))
        except Exception as error:
            return Answer(error=_portable(error))


def _portable(error: Exception) -> Exception:
    """The error with its traceback as a note; another of the same message if it does not survive the way back."""
    error.add_note(traceback.format_exc())
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
