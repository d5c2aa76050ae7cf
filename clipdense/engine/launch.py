"""Start of one or several processes: under torchrun (gloo or nccl) or by Detectron2's launcher."""

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from clipdense.engine.options import ConfigError
from clipdense.engine.rendezvous import join_round

from detectron2.engine import launch as detectron2_launch
from detectron2.utils import comm

__all__ = ["launch", "restarted", "under_torchrun"]

_TIMEOUT = timedelta(minutes=30)

# Key in the store of the process group: how often torchrun has started all processes of this run.
_ROUND = "clipdense/round"


def under_torchrun() -> bool:
    """Return whether this process was started by ``torchrun``, or with the same environment variables."""
    return {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()


def restarted() -> bool:
    """Return whether torchrun has restarted the processes of this run, for whatever reason.

    ``TORCHELASTIC_RESTART_COUNT`` does not say it: a machine counts the failures of its own processes only.
    """
    if not dist.is_initialized():
        return False
    store = dist.distributed_c10d._get_default_store()
    return store.check([_ROUND]) and int(store.get(_ROUND)) > 1


def launch(
    main: Callable[..., Any],
    num_gpus: int,
    num_machines: int = 1,
    machine_rank: int = 0,
    dist_url: str = "auto",
    args: tuple[Any, ...] = (),
) -> Any:
    """Run ``main(*args)`` in every process of the job.

    Under torchrun the process group comes from the environment: nccl with one GPU per process, or gloo on the
    CPU. Otherwise Detectron2's launcher starts ``num_gpus`` processes on each machine; a single process runs
    ``main`` itself.

    Args:
        main: function to run.
        num_gpus: number of GPUs per machine.
        num_machines: number of machines.
        machine_rank: rank of this machine.
        dist_url: address for the process group, as of `detectron2.engine.launch`.
        args: arguments of ``main``.

    Returns:
        Return value of ``main``; None from started processes.

    Raises:
        ConfigError: If the machine has fewer GPUs; the message names the command for the CPU.
    """
    if under_torchrun():
        return _run_in_environment_group(main, args)
    if num_gpus * num_machines > 1:
        if torch.cuda.device_count() < num_gpus:
            raise ConfigError(
                f"--num-gpus is {num_gpus}, but this machine has {torch.cuda.device_count()} GPUs. "
                "To run several processes on the CPU: torchrun --nproc-per-node N tools/train_net.py ..."
            )
        return detectron2_launch(main, num_gpus, num_machines, machine_rank, dist_url, args=args)
    return main(*args)


def _run_in_environment_group(main: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    local_rank, local_size = int(os.environ["LOCAL_RANK"]), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    cuda = torch.cuda.device_count() >= local_size
    if cuda:
        torch.cuda.set_device(local_rank)
    store, rank, size = next(dist.rendezvous("env://", timeout=_TIMEOUT))
    current = join_round(store, rank, size, _TIMEOUT)
    store = dist.PrefixStore(current.name, store)
    backend = "nccl" if cuda else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=_TIMEOUT)
    dist.distributed_c10d._get_default_store().set(_ROUND, str(current.number))
    try:
        _create_local_group(local_size)
        return main(*args)
    finally:
        dist.destroy_process_group()


def _create_local_group(local_size: int) -> None:
    """Create Detectron2's group of the ranks of one machine; torchrun numbers ranks by machine."""
    if hasattr(comm, "create_local_process_group"):  # detectron2 after v0.6
        if comm._LOCAL_PROCESS_GROUP is None:
            comm.create_local_process_group(local_size)
        return
    for first in range(0, dist.get_world_size(), local_size):
        ranks = list(range(first, first + local_size))
        group = dist.new_group(ranks)
        if dist.get_rank() in ranks:
            comm._LOCAL_PROCESS_GROUP = group
