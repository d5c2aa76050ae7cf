"""No process of a run waits for a frozen one, and none outlives its launcher."""

import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from clipdense.engine.liveness import watch_ranks

TIMEOUT = 2.5


def run_rank(rank: int, port: int, folder: Path, slow: bool) -> None:
    """Exchange values with the other process for ever; ``slow``: the first exchange comes late."""
    output = os.open(folder / f"log_{rank}", os.O_WRONLY | os.O_CREAT, 0o644)
    os.dup2(output, 2)
    limit = timedelta(minutes=30)
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2, timeout=limit
    )
    watch_ranks(TIMEOUT)
    while True:
        dist.all_reduce(torch.zeros(1))
        (folder / f"alive_{rank}").touch()
        if slow and rank == 0:
            end = time.monotonic() + 2 * TIMEOUT
            while time.monotonic() < end:  # computes, and does not sleep
                pass
            slow = False
        time.sleep(0.05)


@pytest.fixture(params=[False, True], ids=["", "slow"])
def run(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[tuple[int, list[int]]]:
    """A launcher with two processes; yields the number of the launcher and those of its processes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launcher = os.fork()
    if launcher == 0:
        try:
            for rank in range(2):
                process = os.fork()
                if process == 0:
                    run_rank(rank, port, tmp_path, request.param)
                (tmp_path / f"process_{rank}").write_text(f"{process} ")
            while True:
                os.wait()
        finally:
            os._exit(1)  # a forked process never returns to pytest
    assert wait_until(lambda: all((tmp_path / f"alive_{rank}").exists() for rank in range(2)), 60)
    ranks = [int((tmp_path / f"process_{rank}").read_text()) for rank in range(2)]
    time.sleep(1.5)  # each has been seen alive
    yield launcher, ranks
    for process in [*ranks, launcher]:
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    os.waitpid(launcher, 0)


def wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.1)
    return condition()


def children(process: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def is_running(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


@pytest.mark.parametrize("run", [False], indirect=True)
@pytest.mark.parametrize("frozen", [0, 1])
def test_a_frozen_rank_ends_the_run(run: tuple[int, list[int]], tmp_path: Path, frozen: int) -> None:
    _, ranks = run
    os.kill(ranks[frozen], signal.SIGSTOP)
    assert wait_until(lambda: not any(map(is_running, ranks)), 6 * TIMEOUT)
    text = (tmp_path / f"log_{frozen}").read_text()
    assert f"error: rank {frozen} of 2 is stopped for 2.5 s (SOLVER.RANK_TIMEOUT)" in text


@pytest.mark.parametrize("run", [False], indirect=True)
def test_ranks_end_with_their_launcher(run: tuple[int, list[int]]) -> None:
    launcher, ranks = run
    os.kill(launcher, signal.SIGKILL)
    assert wait_until(lambda: not any(map(is_running, ranks)), 5)


@pytest.mark.parametrize("run", [False], indirect=True)
def test_a_frozen_watcher_ends_with_its_process(run: tuple[int, list[int]]) -> None:
    launcher, ranks = run
    watchers = [child for rank in ranks for child in children(rank)]
    assert len(watchers) == 2
    for watcher in watchers:
        os.kill(watcher, signal.SIGSTOP)
    os.kill(launcher, signal.SIGKILL)
    assert wait_until(lambda: not any(map(is_running, watchers)), 10)


@pytest.mark.parametrize("run", [True], indirect=True)
def test_a_slow_rank_is_waited_for(run: tuple[int, list[int]]) -> None:
    _, ranks = run
    time.sleep(2 * TIMEOUT)
    assert all(map(is_running, ranks))
