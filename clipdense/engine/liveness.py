"""Watch over the processes of a run: none waits for a frozen one, and none outlives its launcher."""

import os
import signal
import socket
import sys
import threading
import time
import uuid
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from clipdense.engine.processes import continue_after_parent, end_with_launcher

from detectron2.utils import comm

__all__ = ["watch_ranks"]

_INTERVAL = 1.0

# Seconds after which a watcher whose process has ended is ended by the system.
_LAST_CALL = 5

# A pause of the watcher itself (Ctrl-Z, a sleeping computer) restarts all waiting times.
_PAUSE = 5.0


def watch_ranks(timeout: float) -> None:
    """End this process when its launcher ends, or when another process of the run is frozen.

    A frozen process, or one whose machine has gone without closing its connections, would leave the others
    waiting for the time limit of the process group. Each process therefore forks a watcher, which tells the
    store of the process group every second that its process is alive. Slow steps (the first iteration, an
    evaluation in the main process) do not matter: the watcher does not depend on the progress of training.

    Args:
        timeout: seconds without a sign of life of a process after which the run ends; 0 never ends it.
    """
    if comm.get_world_size() == 1 or not sys.platform.startswith("linux"):
        return
    end_with_launcher()
    store = dist.distributed_c10d._get_default_store()
    while hasattr(store, "underlying_store"):
        store = store.underlying_store
    if timeout <= 0 or not isinstance(store, dist.TCPStore):
        return
    watched, run = os.getpid(), comm.all_gather(uuid.uuid4().hex)[0]
    if os.fork() == 0:
        try:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            continue_after_parent()
            _Watcher(watched, timeout, store.host, store.port, run).run()
        finally:
            os._exit(0)


class _Watcher:
    """Watcher of one process, in a process of its own.

    Args:
        watched: number of the watched process.
        timeout: see `watch_ranks`.
        host: address of the store.
        port: port of the store.
        run: name that no earlier processes of the store have used; equal in all processes.
    """

    def __init__(self, watched: int, timeout: float, host: str, port: int, run: str) -> None:
        self.watched, self.timeout, self.address = watched, timeout, (host, port)
        self.rank, self.size = comm.get_rank(), comm.get_world_size()
        self.key = f"clipdense/alive/{run}"
        self.counts = [0] * self.size
        self.ended = [False] * self.size
        self.seen = [time.monotonic()] * self.size
        self.stopped = False
        self.ending = False

    def run(self) -> None:
        """Watch until the watched process ends."""
        threading.Thread(target=self._exchange, daemon=True).start()
        stopped_since, before = 0.0, time.monotonic()
        while os.getppid() == self.watched:
            time.sleep(_INTERVAL / 2)
            now = time.monotonic()
            self.stopped = _is_stopped(self.watched)
            if now - before > _PAUSE or not self.stopped:
                stopped_since = now
            if now - before > _PAUSE:
                self.seen = [now] * self.size
            before = now
            if now - stopped_since > self.timeout:
                self._end(self.rank)
            for rank in range(self.size):
                if rank != self.rank and self._is_lost(rank, now):
                    self._end(rank)
        self.ending = True
        signal.alarm(_LAST_CALL)  # the store may have ended too, and its calls block beyond their time limit
        with suppress(RuntimeError):
            store = dist.TCPStore(*self.address, is_master=False, timeout=timedelta(seconds=5))
            store.add(f"{self.key}/ended/{self.rank}", 1)

    def _is_lost(self, rank: int, now: float) -> bool:
        """Return whether a process that has been alive and has not ended gives no sign of life."""
        # its own watcher, if there is one, comes first: it knows the reason
        limit = self.timeout + 3 * _INTERVAL
        return self.counts[rank] > 0 and not self.ended[rank] and now - self.seen[rank] > limit

    def _exchange(self) -> None:
        """Tell the store that the watched process is alive, and read the same of the others, to its end.

        If the store's machine is gone, the calls block or fail, and every other process counts as lost.
        """
        store = dist.TCPStore(*self.address, is_master=False)
        while not self.ending:
            with suppress(RuntimeError):
                if not self.stopped:
                    store.add(f"{self.key}/{self.rank}", 1)
                for rank in range(self.size):
                    count = store.add(f"{self.key}/{rank}", 0)
                    self.ended[rank] = store.add(f"{self.key}/ended/{rank}", 0) > 0
                    if count != self.counts[rank]:
                        self.counts[rank], self.seen[rank] = count, time.monotonic()
            time.sleep(_INTERVAL)

    def _end(self, rank: int) -> None:
        """End the watched process because of a lost one."""
        if self.ending:  # it takes its time
            return
        self.ending = True
        what = "is stopped" if rank == self.rank else "gives no sign of life"
        text = (
            f"error: rank {rank} of {self.size} {what} for {self.timeout:g} s (SOLVER.RANK_TIMEOUT): ending "
            f"rank {self.rank} on {socket.gethostname()}. --resume continues from the last checkpoint.\n"
        )
        with suppress(OSError):
            os.write(2, text.encode())
        with suppress(ProcessLookupError):
            os.kill(self.watched, signal.SIGKILL)


def _is_stopped(process: int) -> bool:
    """Return whether a process is stopped by a signal (state T)."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    except (OSError, IndexError):
        return False
