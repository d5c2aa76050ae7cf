"""Statistics of norms, metrics and random states across processes."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import timm.layers
import torch
import torch.distributed as dist
from torch import Tensor, nn

from detectron2.utils import comm

__all__ = [
    "SyncBatchNorm",
    "convert_sync_batchnorm",
    "local_part",
    "preserved_random_state",
    "random_state",
    "set_random_state",
    "share_rows",
]


class _AllReduce(torch.autograd.Function):
    """Sum over processes, of values and of gradients."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        value = value.clone()
        dist.all_reduce(value)
        return value

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.clone()
        dist.all_reduce(gradient)
        return gradient


class SyncBatchNorm(nn.BatchNorm2d):
    """Batch normalisation over the batches of all processes, on any device, for inputs (N, C, ...).

    Statistics are weighted by the number of values, so that the result equals the norm of the global batch
    even if the processes have batches of different sizes, or empty ones. Detectron2's NaiveSyncBatchNorm does
    not do that for empty batches, and `torch.nn.SyncBatchNorm` works on GPUs only.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"SyncBatchNorm needs an input (N, C, ...), got {tuple(input.shape)}")

    def forward(self, input: Tensor) -> Tensor:
        """Normalise (N, C, ...) over all axes except C; returns the same shape."""
        if not self.training or comm.get_world_size() == 1:
            return super().forward(input)
        self._check_input_dim(input)
        x = input if input.dtype == torch.float64 else input.float()
        axes = [0, *range(2, x.dim())]
        shape = (1, -1) + (1,) * (x.dim() - 2)
        count = x.new_tensor([x.numel() // x.shape[1]])
        sums = _AllReduce.apply(torch.cat([x.sum(axes), count]))
        n = sums[-1].detach()
        mean = sums[:-1] / n
        centred = x - mean.view(shape)
        var = _AllReduce.apply(centred.square().sum(axes)) / n
        self._track(mean.detach(), var.detach() * (n / (n - 1).clamp(min=1)))
        y = centred * (var + self.eps).rsqrt().view(shape)
        if self.affine:
            y = y * self.weight.view(shape) + self.bias.view(shape)
        return y.to(input.dtype)

    def _track(self, mean: Tensor, var: Tensor) -> None:
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked.add_(1)
        momentum = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean), momentum)
        self.running_var.lerp_(var.to(self.running_var), momentum)


class _SyncBatchNormAct(SyncBatchNorm):
    """Synchronised version of timm's ``BatchNormAct2d``: the norm, then ``drop`` and ``act``."""

    drop: nn.Module
    act: nn.Module

    def forward(self, input: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(input)))


def convert_sync_batchnorm(module: nn.Module) -> nn.Module:
    """Replace every batch norm in a module by a synchronised one (torch's on GPUs, else `SyncBatchNorm`).

    Parameters, statistics and mode are kept.

    Raises:
        ValueError: If a batch norm has its own forward, unlike those of torch, timm and Detectron2.
    """
    if not isinstance(module, nn.modules.batchnorm._BatchNorm):
        for name, child in module.named_children():
            setattr(module, name, convert_sync_batchnorm(child))
        return module
    if isinstance(module, SyncBatchNorm):
        return module
    if any(tensor.is_cuda for tensor in module.state_dict().values()):
        return timm.layers.convert_sync_batchnorm(module)
    kind = SyncBatchNorm
    if hasattr(module, "act") and hasattr(module, "drop"):
        kind = _SyncBatchNormAct
    elif not type(module).__module__.startswith(("torch.", "detectron2.")):
        raise ValueError(
            f"MODEL.SYNC_BN: {type(module).__qualname__} has no synchronised version; set MODEL.SYNC_BN False"
        )
    new = kind(module.num_features, module.eps, module.momentum, module.affine, module.track_running_stats)
    new._parameters, new._buffers, new._modules = module._parameters, module._buffers, module._modules
    return new.train(module.training)


def local_part(value: Tensor) -> Tensor:
    """Return this process's shard of a DTensor, detached and in the same memory; other tensors detached."""
    value = value.detach()
    to_local: Any = getattr(value, "to_local", None)  # of DTensor, whose module older versions of torch lack
    return value if to_local is None else to_local()


def share_rows(row: Tensor) -> Tensor:
    """Gather a vector (n,) of each process; returns (processes, n), equal in all processes."""
    if comm.get_world_size() == 1:
        return row[None]
    rows = [torch.empty_like(row) for _ in range(comm.get_world_size())]
    dist.all_gather(rows, row)
    return torch.stack(rows)


def random_state() -> dict[str, Any]:
    """Return the state of every global random generator, in types that load without unpickling code."""
    state: Any = np.random.get_state()  # noqa: NPY002
    kind, keys, position, has_gauss, cached = state
    return {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Restore a state that `random_state` returned, in this process or an earlier one."""
    random.setstate(state["python"])
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, cached))  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


@contextmanager
def preserved_random_state() -> Iterator[None]:
    """Restore the random state at the end of the context."""
    state = random_state()
    try:
        yield
    finally:
        set_random_state(state)
