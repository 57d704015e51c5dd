"""Ending a run early without losing a step of it."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch
from accelerate import Accelerator

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stop:
    """Whether this run was told to end, by SIGTERM or Ctrl-C; all its processes end after the same step."""

    EVERY = 10  # steps between two looks at the other processes

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self._signal = 0

    @contextmanager
    def listening(self) -> Iterator[None]:
        """While the block lasts a first signal is only noted; a second one acts as it would have before."""
        if threading.current_thread() is not threading.main_thread():  # which alone hears signals
            yield
            return
        before = {number: signal.getsignal(number) for number in _SIGNALS}

        def restore() -> None:
            for number, handler in before.items():
                signal.signal(number, handler)

        def note(number: int, frame: FrameType | None) -> None:
            self._signal = number
            restore()

        for number in _SIGNALS:
            if before[number] not in (signal.SIG_IGN, None):
                signal.signal(number, note)
        try:
            yield
        finally:
            restore()

    def is_asked(self, step: int) -> bool:
        """Whether to end after this step."""
        if self.accelerator.num_processes == 1:
            return self._signal != 0
        if step % self.EVERY:
            return False
        asked = torch.tensor(float(self._signal), device=self.accelerator.device)
        self._signal = int(self.accelerator.gather(asked[None]).max())
        return self._signal != 0

    def leave(self, step: int) -> None:
        """End the process, as the signal would have."""
        self.accelerator.print(f"train: told to end, after step {step}; --resume goes on from here", file=sys.stderr)
        if self._signal == signal.SIGINT:
            raise KeyboardInterrupt
        sys.exit(128 + self._signal)
