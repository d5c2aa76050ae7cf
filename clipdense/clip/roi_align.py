"""RoIAlign as the whole project calls it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.ops import roi_align as _roi_align

__all__ = ["roi_align"]


def roi_align(
    features: Tensor,
    boxes: Tensor | Sequence[Tensor],
    output_size: int | tuple[int, int],
    *,
    scale: float = 1.0,
    sampling_ratio: int = -1,
) -> Tensor:
    """Resample boxes of a map with RoIAlign, aligned to pixel centres (He et al., Mask R-CNN, ICCV 2017).

    Half precision is computed in float32: torchvision's CPU kernel has no other, and on a GPU the corners of
    large boxes would be rounded to whole pixels.

    Args:
        features: (B, C, h, w).
        boxes: xyxy; one (n_i, 4) an image, or (N, 5) whose first column is the image.
        output_size: height and width of the result.
        scale: map cells per unit of the boxes: 1 / stride for boxes in pixels.
        sampling_ratio: sampling points per output cell and axis; -1: as many as the box has map cells there.

    Returns:
        (N, C, *output_size), image by image for lists, in the dtype of `features`.
    """
    exact = features if features.dtype in (torch.float32, torch.float64) else features.float()
    boxes = boxes.to(exact) if isinstance(boxes, Tensor) else [b.to(exact) for b in boxes]
    pooled: Tensor = _roi_align(exact, boxes, output_size, scale, sampling_ratio, aligned=True)
    return pooled.to(features.dtype)
