"""What each user has made, in folders that other users cannot guess and that vanish with the session."""

from __future__ import annotations

import secrets
import shutil
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from diff2to3._asset import Asset


class Run:
    """The samples of one call. Their files are written when they are asked for, and then kept."""

    def __init__(self, folder: Path, name: str, samples: int) -> None:
        self.folder, self.name, self.samples = folder, name, samples
        self.assets: list[Asset] = []
        self.shown = 0

    def file(self, sample: int, suffix: str) -> Path:
        """The file of a sample in the format of a suffix, written unless it is there."""
        number = f"-{sample}" if self.samples > 1 else ""
        path = self.folder / f"{self.name}{number}.{suffix}"
        if not path.exists():
            self.assets[sample].save(path)
        return path


class Session:
    """One user: a folder, and the run that the page shows."""

    def __init__(self, root: Path) -> None:
        self._folder = root / secrets.token_urlsafe(16)
        self.run: Run | None = None
        self.working = 0  # calls that will still give files
        self.left: float | None = None  # when the user went, so it seems

    def folder(self) -> Path:
        """A new folder."""
        path = self._folder / secrets.token_urlsafe(4)
        path.mkdir(parents=True, mode=0o700)
        return path

    def new_run(self, name: str, samples: int) -> Run:
        """A run in a folder of its own."""
        return Run(self.folder(), name, samples)

    def show(self, run: Run) -> None:
        """Make a run the one of the page; the files of the one before are removed."""
        if self.run is not None:
            shutil.rmtree(self.run.folder, ignore_errors=True)
        self.run = run

    def close(self) -> None:
        """Remove everything."""
        self.run = None
        shutil.rmtree(self._folder, ignore_errors=True)


class Sessions:
    """The sessions of a server, by the key that Gradio gives each page or client.

    Args:
        root: folder of all their files.
        limit: of those that wait for nothing the oldest go when there are more.
        grace: seconds after which the files of a user are removed who seems to be gone.
    """

    def __init__(self, root: Path, limit: int, grace: float = 120.0) -> None:
        self.root, self._limit, self.grace = root, limit, grace
        self._sessions: OrderedDict[str, Session] = OrderedDict()
        self._lock = threading.Lock()
        self.sweeper: threading.Timer | None = None

    def of(self, key: str | None) -> Session:
        """The session of a key, new where there is none; a client without a key gets a new one each time."""
        return self._used(key or secrets.token_urlsafe(16), work=0)

    @contextmanager
    def working(self, key: str | None) -> Iterator[Session]:
        """The session of a key, of which nothing is removed before the block ends."""
        key = key or secrets.token_urlsafe(16)
        session = self._used(key, work=1)
        try:
            yield session
        finally:
            with self._lock:
                session.working -= 1
            if session.left is not None:
                self.leave(key)  # time to come for the files

    def leave(self, key: str | None) -> None:
        """The connection of a user is lost: forget the session in a while, unless it is used again.

        A closed page looks like a network or a server that was too busy for the connection's sign of life.
        """
        with self._lock:
            session = self._sessions.get(key or "")
            if session is not None:
                session.left = time.monotonic()
                self._sweep_later()

    def sweep(self) -> None:
        """Remove what belongs to users who have been gone for long enough."""
        with self._lock:
            over = time.monotonic() - self.grace
            gone = [key for key, found in self._leaving() if found <= over]
            removed = [self._sessions.pop(key) for key in gone]
            self.sweeper = None
            self._sweep_later()
        for session in removed:
            session.close()

    def _sweep_later(self) -> None:
        times = [left for _, left in self._leaving()]
        if times and self.sweeper is None:  # one thread for all of them
            self.sweeper = threading.Timer(max(0.0, min(times) + self.grace - time.monotonic()), self.sweep)
            self.sweeper.daemon = True
            self.sweeper.start()

    def _leaving(self) -> list[tuple[str, float]]:
        """Keys of the users who are gone and wait for nothing, and when they went."""
        return [
            (key, found.left) for key, found in self._sessions.items() if found.left is not None and not found.working
        ]

    def _used(self, key: str, work: int) -> Session:
        with self._lock:
            session = self._sessions.setdefault(key, Session(self.root))
            self._sessions.move_to_end(key)
            session.working += work
            session.left = None
            idle = [other for other, found in self._sessions.items() if not found.working and found is not session]
            surplus = [self._sessions.pop(old) for old in idle[: max(0, len(self._sessions) - self._limit)]]
        for old in surplus:
            old.close()
        return session
