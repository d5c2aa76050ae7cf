"""SIGINT (Ctrl-C) and SIGTERM as a request to stop."""

import logging
import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

__all__ = ["Interrupt"]


class Interrupt:
    """Context in which the first SIGINT or SIGTERM is recorded; the second has its usual effect.

    Processes forked within the context (data loading) ignore the first signal.

    Attributes:
        signal: number of the received signal; 0 if there was none.
    """

    def __init__(self) -> None:
        self.signal, self._process = 0, 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Interrupt":
        self.signal, self._process = 0, os.getpid()
        if threading.current_thread() is threading.main_thread():  # signal.signal works nowhere else
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._restore()
        if os.getpid() != self._process:
            return
        self.signal = number
        logging.getLogger(__name__).warning(
            "%s: saving a checkpoint after this iteration, then exiting. "
            "Interrupt again to exit immediately.",
            signal.Signals(number).name,
        )

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()
