"""Progress on stderr; nothing is drawn before the end where stderr is not a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from diff2to3._pipeline import Callback

T = TypeVar("T")


def track(items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """Yields ``items`` while a bar on stderr shows how far they are."""
    from rich.console import Console
    from rich.progress import track as rich_track

    yield from rich_track(items, description, total=total, console=Console(stderr=True), transient=True)


class Bars:
    """Progress on stderr: how many objects are done, and a bar for each stage of the one at work."""

    def __init__(self, progress: Any) -> None:
        self._progress = progress
        self._stages: dict[tuple[str, str], Any] = {}

    @contextmanager
    def step(self, description: str) -> Iterator[None]:
        """A pulsing line while something without known length goes on."""
        task = self._progress.add_task(description, total=None)
        try:
            yield
        finally:
            self._progress.remove_task(task)

    @contextmanager
    def counting(self, total: int) -> Iterator[Any]:
        """A bar over several objects; gives what is to be called after each. None is shown for one object."""
        if total == 1:
            yield lambda: None
            return
        task = self._progress.add_task("objects", total=total)
        yield lambda: self._progress.advance(task)

    def callback(self, name: str) -> Callback:
        """A callback for `Pipeline` that shows the stages of the object `name`; those of the one before go."""
        for task in self._stages.values():
            self._progress.remove_task(task)
        self._stages.clear()

        def report(stage: str, done: int, total: int) -> None:
            if (name, stage) not in self._stages:
                self._stages[name, stage] = self._progress.add_task(f"{name}: {stage}", total=total)
            self._progress.update(self._stages[name, stage], completed=done, total=total)

        return report


@contextmanager
def progress(visible: bool = True) -> Iterator[Bars]:
    """Bars that show while the block lasts."""
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
    shown = Progress(*columns, console=Console(stderr=True), redirect_stdout=False, disable=not visible)
    shown.start()
    try:
        yield Bars(shown)
    except BaseException:
        shown.live.transient = True  # leave nothing but the error's own line
        shown.live.stop()
        raise
    shown.stop()
