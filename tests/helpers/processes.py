"""Several gloo processes, forked from the test."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing


def _run(rank: int, function: Callable[..., Any], size: int, folder: str, args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
    try:
        torch.save(function(*args), f"{folder}/{rank}.pth")
    finally:
        dist.destroy_process_group()


def run_processes(function: Callable[..., Any], size: int, folder: Path, *args: Any) -> list[Any]:
    """Run ``function(*args)`` in each of ``size`` processes of a group; returns the results by rank.

    Args:
        folder: does not exist yet.
    """
    folder.mkdir()
    torch.multiprocessing.start_processes(
        _run, (function, size, os.fspath(folder), args), nprocs=size, start_method="fork"
    )
    return [torch.load(folder / f"{rank}.pth", weights_only=False) for rank in range(size)]
