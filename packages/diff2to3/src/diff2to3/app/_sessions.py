"""What each user has made, in folders that other users cannot guess and that vanish with the session."""

from __future__ import annotations

import secrets
import shutil
import threading
from collections import OrderedDict
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
    """The sessions of a server, by the key that Gradio gives each page or client; at most `limit`, the oldest go."""

    def __init__(self, root: Path, limit: int) -> None:
        self.root, self._limit = root, limit
        self._sessions: OrderedDict[str, Session] = OrderedDict()
        self._lock = threading.Lock()

    def of(self, key: str | None) -> Session:
        """The session of a key, new where there is none; a client without a key gets a new one each time."""
        key = key or secrets.token_urlsafe(16)
        with self._lock:
            session = self._sessions.setdefault(key, Session(self.root))
            self._sessions.move_to_end(key)
            surplus = [self._sessions.popitem(last=False)[1] for _ in range(len(self._sessions) - self._limit)]
        for old in surplus:
            old.close()
        return session

    def close(self, key: str | None) -> None:
        """Forget a session and remove its files."""
        with self._lock:
            session = self._sessions.pop(key or "", None)
        if session is not None:
            session.close()
