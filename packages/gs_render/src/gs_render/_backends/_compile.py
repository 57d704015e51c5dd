"""`compiled`: numba's `njit` with machine code kept on disk where that is possible."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any, TypeVar

import numba as nb

F = TypeVar("F", bound=Callable[..., Any])
_logger = logging.getLogger(__name__)


def compiled(**options: Any) -> Callable[[F], F]:
    """Decorator: compile at the first call, cached on disk; without a writable folder, anew in every process.

    numba looks at NUMBA_CACHE_DIR, the package's own folder and the user's cache folder, and refuses to define a
    function where none can be written (a read-only container, a service without a home).
    """

    def decorate(function: F) -> F:
        try:
            return nb.njit(cache=True, **options)(function)
        except RuntimeError as error:
            if "no locator available" not in str(error):
                raise
            _say_uncached()
            return nb.njit(**options)(function)

    return decorate


@functools.cache
def _say_uncached() -> None:
    _logger.info("no folder for compiled code can be written: every process compiles anew (NUMBA_CACHE_DIR names one)")
