"""Processes that end with the process that started them."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Callable

__all__ = ["continue_after_parent", "end_with_launcher", "end_with_parent"]

_PR_SET_PDEATHSIG = 1


def end_with_parent() -> Callable[[], None] | None:
    """Return a function that a child process calls first, so that it is killed when its parent ends.

    It does for Linux what process groups cannot: it also holds if the parent is killed with SIGKILL. Give it
    to `subprocess.Popen` as ``preexec_fn``, or call it in a forked process.

    Returns:
        The function; None on other systems than Linux.
    """
    if not sys.platform.startswith("linux"):
        return None
    parent, prctl = os.getpid(), ctypes.CDLL(None).prctl  # resolved before the fork

    def call() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it ended before the call
            os._exit(1)

    return call


def end_with_launcher() -> None:
    """Let this process be killed when the process that started it ends (on Linux)."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def continue_after_parent() -> None:
    """Let this process go on when its parent ends, in case it is stopped (on Linux)."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGCONT)
