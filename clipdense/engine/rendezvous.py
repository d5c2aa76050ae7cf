"""Agreement of the processes that torchrun has started, or started again, on a name of their round."""

import json
import time
import uuid
from datetime import timedelta
from typing import NamedTuple

import torch.distributed as dist

__all__ = ["Round", "join_round"]

_PREFIX = "clipdense/rounds"

# Seconds between two looks at the store: the first, and the longest.
_PAUSES = (0.02, 1.0)


class Round(NamedTuple):
    """One start of all processes of a run.

    Attributes:
        name: differs from that of every other round, and is the same in all processes.
        number: counts the rounds in which all processes met, from 1.
    """

    name: str
    number: int


def join_round(store: dist.Store, rank: int, size: int, timeout: timedelta) -> Round:
    """Meet the other processes that were started together with this one.

    torchrun keeps one store from the first start to the last restart, and PyTorch writes the addresses of
    the processes under the same keys each time. A restarted process may therefore call the address of one
    that has ended ("connection refused"). No environment variable tells the rounds apart on all machines:
    each of them counts its own failures in ``TORCHELASTIC_RESTART_COUNT``. So the processes agree here on a
    name, with which the keys of their group can begin. The first process draws it. The others answer each
    name that they read with a number of their own; a name whose list of answers has this number is not an
    old one.

    Args:
        store: store that all processes of a round share, with or without the keys of earlier rounds.
        rank: rank of this process.
        size: number of processes.
        timeout: how long to wait for the others.

    Raises:
        TimeoutError: If not all processes have come in time.
    """
    end = time.monotonic() + timeout.total_seconds()
    if rank == 0:
        return _open_round(store, size, end)
    answer, pause = uuid.uuid4().hex, _PAUSES[0]
    while time.monotonic() < end:
        if store.check([f"{_PREFIX}/name"]):
            name = store.get(f"{_PREFIX}/name").decode()
            store.set(f"{_PREFIX}/{name}/{rank}", answer)
            if store.check([f"{_PREFIX}/{name}"]):
                number, answers = json.loads(store.get(f"{_PREFIX}/{name}"))
                if answers[rank:] and answers[rank] == answer:
                    return Round(name, number)
        time.sleep(pause)
        pause = min(2 * pause, _PAUSES[1])
    raise TimeoutError(f"rank {rank} of {size}: rank 0 has not answered within {timeout}")


def _open_round(store: dist.Store, size: int, end: float) -> Round:
    """Draw the name, and publish the answers of all other processes (see `join_round`)."""
    name, pause = uuid.uuid4().hex, _PAUSES[0]
    store.set(f"{_PREFIX}/name", name)
    missing = set(range(1, size))
    while missing := {rank for rank in missing if not store.check([f"{_PREFIX}/{name}/{rank}"])}:
        if time.monotonic() > end:
            raise TimeoutError(f"rank 0 of {size}: ranks {sorted(missing)} have not come in time")
        time.sleep(pause)
        pause = min(2 * pause, _PAUSES[1])
    answers = [""] + [store.get(f"{_PREFIX}/{name}/{rank}").decode() for rank in range(1, size)]
    number = store.add(f"{_PREFIX}/number", 1)
    store.set(f"{_PREFIX}/{name}", json.dumps([number, answers]))
    return Round(name, number)
