"""Exclusive use of a folder by one process."""

from __future__ import annotations

import fcntl
import os
import shlex
import socket
import sys
import time
from pathlib import Path

__all__ = ["FolderLock", "FolderLockedError"]

_NAME = "run.lock"


class FolderLockedError(OSError):
    """Another process uses the folder; the message names the folder, the process and the remedy."""


class FolderLock:
    """Lock of a folder, held by this process from `acquire` to `release` or to the end of the process.

    The operating system keeps the lock (POSIX record lock on ``run.lock``). It ends with the process, however
    the process ends, and child processes do not inherit it. A file that a killed process left is therefore
    never in the way. The file names the process that holds the lock.

    Args:
        folder: folder to lock; it must exist.
        key: name of the setting that chooses the folder, for the message.
    """

    # This process's open lock files. Closing any handle of a file ends the process's lock on it, so a file is
    # opened once. A forked process has a copy of this table, but not the locks: hence the process number.
    _open: dict[Path, tuple[int, int]] = {}

    def __init__(self, folder: str | os.PathLike[str], key: str) -> None:
        self.folder, self.key = Path(folder).resolve(), key

    def acquire(self) -> None:
        """Lock the folder; do nothing if this process holds the lock already.

        Raises:
            FolderLockedError: If another process holds the lock.
            OSError: If the lock file cannot be written.
        """
        if self._open.get(self.folder, (0, 0))[0] == os.getpid():
            return
        handle = os.open(self.folder / _NAME, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as e:
            owner = os.read(handle, 4096).decode(errors="replace").strip() or "another process"
            os.close(handle)
            raise FolderLockedError(
                f"{self.key} {self.folder} is in use by {owner}. "
                f"Wait until it has ended, or choose another {self.key}."
            ) from e
        except OSError:  # a file system without locks
            os.close(handle)
            return
        os.ftruncate(handle, 0)
        started = time.strftime("%Y-%m-%d %H:%M:%S")
        command = shlex.join(sys.argv)[:500]
        os.write(handle, f"process {os.getpid()} on {socket.gethostname()} ({command}, {started})\n".encode())
        self._open[self.folder] = (os.getpid(), handle)

    def release(self) -> None:
        """Unlock the folder; do nothing if this process does not hold the lock."""
        process, handle = self._open.pop(self.folder, (0, -1))
        if process == os.getpid():
            os.close(handle)
