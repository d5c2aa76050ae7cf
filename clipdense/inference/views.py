"""Test-time augmentation: the mean of maps over scaled and mirrored views of an image."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["average_views"]


@torch.no_grad()
def average_views(
    function: Callable[[Tensor], Tensor],
    images: Tensor,
    *,
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
    size: tuple[int, int] | None = None,
) -> Tensor:
    """Average the maps of a function over scaled and horizontally mirrored views.

    Args:
        function: From images (B, C, h, w) to score maps (B, K, h', w').
        images: (B, C, H, W).
        scales: Factors of the image's sides, above 0; sides are rounded to whole pixels.
        flip: Add the mirrored view of each scale; its maps are mirrored back.
        size: Height and width of the result; default: those of the images.

    Returns:
        (B, K, *size), the mean over all views after bilinear resizing.

    Raises:
        ValueError: If there is no scale, or a scale is not above 0.
    """
    if not scales or min(scales) <= 0:
        raise ValueError(f"scales must be factors above 0, not {tuple(scales)}")
    height, width = images.shape[-2:]
    size = size or (height, width)
    total: Tensor | None = None
    for scale in scales:
        scaled = images
        if scale != 1:
            sides = max(1, round(height * scale)), max(1, round(width * scale))
            scaled = F.interpolate(images, sides, mode="bilinear", align_corners=False)
        total = _add(total, _resize(function(scaled), size))
        if flip:
            total = _add(total, _resize(function(scaled.flip(-1)).flip(-1), size))
    assert total is not None
    return total / (len(scales) * (1 + flip))


def _add(total: Tensor | None, maps: Tensor) -> Tensor:
    """Add maps, on the CPU if either is there: a function may keep large maps in main memory."""
    if total is None:
        return maps
    device = maps.device if maps.device.type == "cpu" else total.device
    return total.to(device) + maps.to(device)


def _resize(maps: Tensor, size: tuple[int, int]) -> Tensor:
    if maps.shape[-2:] == size:
        return maps
    return F.interpolate(maps, size, mode="bilinear", align_corners=False)
