"""Files that are either whole or not there."""

from __future__ import annotations

import glob
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from diff2to3._errors import InputError, OutputError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path of the same name in a temporary folder beside `path`; what is there replaces it when the block ends well.

    The name is kept because some formats write it into the file.
    """
    folder = Path(tempfile.mkdtemp(prefix=_own_prefix(), dir=path.parent))
    temporary = folder / path.name
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(mode)  # some writers make private files, whatever the umask
        os.replace(temporary, path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """For command lines: turns what the file system refuses (full disk, no permission ...) into an `OutputError`."""
    try:
        yield
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror or error}") from error


@contextmanager
def output_folder(path: Path) -> Iterator[Path]:
    """Make a folder with its parents; what was made is removed again if the block fails and left it empty.

    Temporary folders that killed runs left in it are removed.

    Raises:
        InputError: it cannot be made or written to.
    """
    made = [folder for folder in (path, *path.parents) if not folder.exists()]
    try:
        _make_writable(path)
        yield path
    except BaseException:
        for folder in made:
            with suppress(OSError):  # not empty: finished results stay
                folder.rmdir()
        raise


def _make_writable(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):  # permissions alone do not tell: the file system may be read-only
            pass
        _remove_what_killed_runs_left(path)
    except (FileExistsError, NotADirectoryError) as error:
        raise InputError(f"{path} cannot be the output folder: a file is in the way") from error
    except OSError as error:
        raise InputError(f"the output folder {path} is not writable: {error.strerror}; expected one that is") from error


def expect_new(path: Path) -> None:
    """Raise an `InputError` where there is something at `path`."""
    if path.exists() or path.is_symlink():
        raise InputError(f"{path} exists; expected the name of a folder to make")


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path` that becomes `path` when the block ends well, and vanishes when not.

    Raises:
        InputError: there is something at `path`, or nothing can be written there.
    """
    expect_new(path)
    with output_folder(path.absolute().parent) as parent:
        folder = parent / f"{_own_prefix()}{path.name}"
        try:
            folder.mkdir()
            yield folder
            folder.rename(path)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def staging(directory: Path, name: str, last: str) -> Iterator[Path]:
    """A temporary folder inside `directory` whose files move there when the block ends well, and vanish when not.

    The file called `last` moves after all others, when they are safely on the disk, and an older one goes before
    anything moves: where it is, the others are, whole and of the same make.
    """
    folder = directory / f"{_own_prefix()}{name}"
    try:
        folder.mkdir()
        yield folder
        files = sorted(folder.iterdir(), key=lambda file: (file.name == last, file.name))
        for file in files:
            sync(file)
        (directory / last).unlink(missing_ok=True)
        for file in files:
            os.replace(file, directory / file.name)
        sync(directory)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def sync(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _own_prefix() -> str:
    """How the names of this process's temporary folders begin."""
    return f".{platform.node()}-{os.getpid()}-tmp-"


def _remove_what_killed_runs_left(directory: Path) -> None:
    """Temporary folders of processes of this machine that are no more."""
    for folder in directory.glob(f".{glob.escape(platform.node())}-*-tmp-*"):
        number = folder.name.removeprefix(f".{platform.node()}-").partition("-")[0]
        if number.isdigit() and not _is_running(int(number)):
            shutil.rmtree(folder, ignore_errors=True)


def _is_running(pid: int) -> bool:
    if os.name != "posix":
        return True  # signal 0 would end it there
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass  # somebody else's
    return True
