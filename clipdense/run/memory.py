"""Images that need more memory than there is."""

from __future__ import annotations

import re
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

__all__ = ["available_memory", "describe_out_of_memory", "is_out_of_memory", "within_memory"]

_SHARE = 0.95  # of the available memory; the rest is for other processes


def available_memory() -> int | None:
    """Return the bytes of main memory that this process may still take, by the machine's and the container's
    limits; None if they are not known."""
    found = []
    with suppress(OSError, ValueError):
        lines = re.findall(r"(MemAvailable|SwapFree):\s*(\d+) kB", Path("/proc/meminfo").read_text())
        if "MemAvailable" in dict(lines):
            found.append(1024 * sum(int(value) for _, value in lines))
    with suppress(OSError, ValueError):  # "max" is no number
        group = Path("/sys/fs/cgroup")
        limit, used = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
        found.append(max(0, limit - used))
    return min(found, default=None)


@contextmanager
def within_memory(available: int | None) -> Iterator[None]:
    """Let requests for more main memory than there is fail within the block.

    Linux grants such requests, and ends the process when the memory is used. A request that fails is an error
    of one image instead. Other systems, and limits that cannot be set, change nothing.

    Args:
        available: bytes that may be requested in addition, see `available_memory`; None for any number.
    """
    if available is None or not sys.platform.startswith("linux"):
        yield
        return
    before = resource.getrlimit(resource.RLIMIT_DATA)
    try:
        with suppress(OSError, ValueError, IndexError):
            used = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
            soft = used + int(_SHARE * available)
            highest = [limit for limit in before if limit != resource.RLIM_INFINITY]
            resource.setrlimit(resource.RLIMIT_DATA, (min([soft, *highest]), before[1]))
        yield
    finally:
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_DATA, before)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that the memory of the machine or of an accelerator is used up.

    PyTorch raises a plain RuntimeError where the CPU's memory is used up, and OpenCV an error of its own.
    """
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    text = str(error)
    return "DefaultCPUAllocator" in text or "not enough memory" in text or "Insufficient memory" in text


def describe_out_of_memory(sample: dict[str, Any] | None = None) -> MemoryError:
    """Make the error that is listed for an image.

    Args:
        sample: The model's input for the image; None if the image was not read.
    """
    if sample is None:
        return MemoryError("not enough memory to read this image: reduce its size")
    height, width = sample["image"].shape[-2:]
    size = f"{sample.get('height', height)} x {sample.get('width', width)}"
    return MemoryError(
        f"not enough memory for an image of {size} pixels ({height} x {width} in the model): set smaller "
        "INPUT.MIN_SIZE_TEST and INPUT.MAX_SIZE_TEST, or ask for one kind of output"
    )
