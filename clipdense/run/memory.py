"""Images that need more memory than there is."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["describe_out_of_memory", "is_out_of_memory"]


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
