"""Files that are either whole or not there."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, of the same suffix, that takes its place when the block ends well."""
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def staging(directory: Path, name: str) -> Iterator[Path]:
    """A temporary folder inside `directory`, whose files move there when the block ends well; nothing remains if not."""
    folder = directory / f".{name}.{os.getpid()}.tmp"
    folder.mkdir()
    try:
        yield folder
        for file in sorted(folder.iterdir()):
            os.replace(file, directory / file.name)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
