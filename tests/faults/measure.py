"""What the scripts beside it share: the memory of a process, and how much a curve has grown."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path


def resident(pid: int | None = None) -> float:
    """Resident memory of a process (Linux), MB; without a number, of this one."""
    pages = int(Path(f"/proc/{pid or 'self'}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def growth(curve: Sequence[float], skip: int = 1, window: int = 3) -> float:
    """Mean of the last values over that of the first after `skip` warm-up values, minus 1.

    Raises:
        ValueError: fewer values than two windows.
    """
    warm = curve[skip:]
    if len(warm) < 2 * window:
        raise ValueError(f"{len(curve)} values are too few to tell a growth; expected {skip + 2 * window} or more")
    return sum(warm[-window:]) / sum(warm[:window]) - 1
