"""Denormal numbers, with which many CPUs compute more slowly than with others."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["denormals_are_flushed", "flush_denormals"]


def denormals_are_flushed() -> bool:
    """Return whether this thread computes zero instead of denormal numbers."""
    smallest = torch.tensor(torch.finfo(torch.float32).tiny)
    return bool((smallest / 2 == 0).item())


@contextmanager
def flush_denormals() -> Iterator[None]:
    """Compute zero instead of denormal numbers in this thread, and in threads that it starts.

    Nearly one-hot attention, such as that of CLIP's attention pools, makes millions of denormal numbers. How
    much time they cost depends on the processor; some show no difference. Numbers below 1e-38 do not matter
    to a model. The previous mode returns at the end. Processors without such a mode ignore it.
    """
    before = denormals_are_flushed()
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(before)
