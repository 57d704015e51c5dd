"""SIGTERM and Ctrl-C unwind the stack, so that half-written files are removed, at whatever moment they come."""

from __future__ import annotations

import signal
import sys
from types import FrameType

RETRY_SECONDS = 0.02


class _Interrupted(KeyboardInterrupt):
    """Ctrl-C.

    A class of its own because of ``python -m``: once a `KeyboardInterrupt` itself has left an ``exec`` or ``eval`` of
    text (dataclasses and named tuples are made by them), Python kills the process at its end, whatever its exit code.
    """


def hear_signals() -> None:
    """From now on SIGTERM raises `SystemExit` and Ctrl-C `KeyboardInterrupt`, where they can reach the caller."""
    signal.signal(signal.SIGTERM, _end)
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:  # else somebody wants it ignored
        signal.signal(signal.SIGINT, _end)
    sys.unraisablehook = _raise_again


def ignore_signals() -> None:
    """The work is over: nothing is to be raised while Python closes down."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_REAL, 0)


def _end(signum: int, frame: FrameType | None) -> None:
    _raise(_Interrupted() if signum == signal.SIGINT else SystemExit(128 + signum), frame)


def _raise(end: BaseException, frame: FrameType | None) -> None:
    """Raise, but not out of an import: PyTorch aborts when one of its C++ callbacks is left by it, others drop it."""
    if not (_is_importing(frame) and _postpone(end)):
        raise end


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def _postpone(end: BaseException) -> bool:
    """Try again in a moment; False where there is no such timer (Windows)."""
    if not hasattr(signal, "setitimer"):
        return False
    signal.signal(signal.SIGALRM, lambda _, frame: _raise(end, frame))
    signal.setitimer(signal.ITIMER_REAL, RETRY_SECONDS)
    return True


def _raise_again(dropped: sys.UnraisableHookArgs) -> None:
    """What a signal raises inside a destructor or a callback would be lost: raise it after that."""
    end = dropped.exc_value
    if not (isinstance(end, SystemExit | KeyboardInterrupt) and _postpone(end)):
        sys.__unraisablehook__(dropped)
