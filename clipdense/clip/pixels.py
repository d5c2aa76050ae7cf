"""Pixel normalisation: the one place where images become a CLIP's input."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["normalize_pixels"]


def normalize_pixels(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Normalise RGB images per channel.

    Args:
        images: (..., 3, H, W) RGB, 0..255, uint8 or float.
        mean: per channel, of images in 0..1 (`ClipModel.pixel_mean`).
        std: per channel, of images in 0..1 (`ClipModel.pixel_std`).

    Returns:
        (..., 3, H, W) on the same device; float32 for integer images, otherwise the dtype of the images.
    """
    dtype = images.dtype if images.is_floating_point() else torch.float32
    center, scale = (
        255 * torch.tensor(s, dtype=dtype, device=images.device).view(3, 1, 1) for s in (mean, std)
    )
    return (images - center) / scale
