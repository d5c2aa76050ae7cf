"""Processes that torchrun starts again on the store of their predecessors do not meet these."""

import multiprocessing
import os
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from clipdense.engine.launch import launch, restarted
from clipdense.engine.rendezvous import Round, join_round

LIMIT = timedelta(seconds=20)


def join(store: dist.Store, order: list[int]) -> list[Round]:
    """Let ranks join one after the other, 0.1 s apart; returns their rounds by rank."""
    with ThreadPoolExecutor(len(order)) as pool:
        found = {}
        for rank in order:
            found[rank] = pool.submit(join_round, store, rank, len(order), LIMIT)
            time.sleep(0.1)
        return [found[rank].result() for rank in sorted(found)]


def test_every_round_has_its_own_name() -> None:
    store = dist.HashStore()
    rounds = [join(store, [2, 0, 1])]
    for rank in (0, 1):  # some that never meet
        with pytest.raises(TimeoutError, match=f"rank {rank} of 2"):
            join_round(store, rank, 2, timedelta(seconds=0.2))
    rounds += [join(store, [1, 2, 0]), join(store, [1, 0]), join(store, [2, 3, 1, 0]), join(store, [0])]
    assert all(len(set(found)) == 1 for found in rounds)
    assert len({found[0].name for found in rounds}) == 5
    assert [found[0].number for found in rounds] == [1, 2, 3, 4, 5]


def add_ranks(folder: str) -> None:
    total = torch.tensor([1.0 + dist.get_rank()])
    dist.all_reduce(total)
    Path(folder, f"{dist.get_rank()}").write_text(f"{float(total):g} {restarted()}")
    dist.barrier()
    os._exit(1)  # without leaving the group, as a process that is killed


def start(rank: int, port: int, folder: str, late: bool) -> None:
    """Run `add_ranks` in a process with the environment of torchrun's."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    if late:
        time.sleep(0.4)
    launch(add_ranks, 1, args=(folder,))


def test_a_restarted_group_does_not_call_its_predecessors(tmp_path: Path) -> None:
    """Without `join_round`, the first process calls the last one's predecessor, or waits to be called.

    That depends on the order of their random ports, so that each restart fails in about half of all cases.
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # torchrun's, which stays
    context = multiprocessing.get_context("fork")
    for attempt in range(7):
        folder = tmp_path / f"{attempt}"
        folder.mkdir()
        late = [None, 0, 1][attempt % 3]
        arguments = [(rank, store.port, str(folder), rank == late) for rank in range(2)]
        ranks = [context.Process(target=start, args=each) for each in arguments]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(20)
            process.kill()
        found = [(folder / f"{rank}").read_text() for rank in range(2)]
        assert found == [f"3 {attempt > 0}"] * 2, attempt
