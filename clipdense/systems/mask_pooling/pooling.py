"""Named policies that turn mask logits into the weights with which a map is pooled."""

from __future__ import annotations

from typing import Literal, get_args

import torch.nn.functional as F
from torch import Tensor

from clipdense.regions import pool_masks, resize_masks

__all__ = ["MaskPolicy", "pool_logits", "region_masks"]

MaskPolicy = Literal["fcclip", "odise", "clipself", "soft"]
"""How a mask becomes a region of a coarse map.

- "fcclip": the logits are resized bilinearly; cells above 0 are inside (FC-CLIP, Yu et al., NeurIPS 2023).
- "odise": the logits are resized bilinearly to the pixels that the cells cover; a cell with one pixel of at
  least 0 is inside (ODISE, Xu et al., CVPR 2023, whose code compares probabilities with 0.5). It keeps
  objects that are smaller than a cell.
- "clipself": the binary mask is resized bicubically; cells above 0 are inside (CLIPSelf, Wu et al., ICLR
  2024).
- "soft": the logits are resized bilinearly; their probabilities are weights.
"""


def region_masks(
    mask_logits: Tensor, size: tuple[int, int], policy: MaskPolicy = "fcclip", *, cell: int = 1
) -> Tensor:
    """Resize mask logits to a map.

    Args:
        mask_logits: (B, Q, H, W).
        size: Height and width of the map in cells.
        policy: See `MaskPolicy`.
        cell: "odise": side of a cell in pixels.

    Returns:
        (B, Q, h, w): bool, or weights in 0 .. 1 for "soft". Masks without a cell are empty.

    Raises:
        ValueError: If the policy is unknown.
    """
    if policy == "clipself":
        return resize_masks(mask_logits.flatten(0, 1) > 0, size).unflatten(0, mask_logits.shape[:2])
    if policy == "odise":
        pixels = _resize(mask_logits, (size[0] * cell, size[1] * cell))
        return F.max_pool2d(pixels, cell) >= 0
    if policy not in get_args(MaskPolicy):
        raise ValueError(f"masks must be one of {', '.join(get_args(MaskPolicy))}, not {policy!r}")
    resized = _resize(mask_logits, size)
    return resized.sigmoid() if policy == "soft" else resized > 0


def pool_logits(features: Tensor, mask_logits: Tensor) -> Tensor:
    """Pool a map inside each mask by FC-CLIP's policy: (B, C, h, w), (B, Q, H, W) -> (B, Q, C); 0 where a
    mask is empty."""
    masks = region_masks(mask_logits, (features.shape[-2], features.shape[-1]))
    return pool_masks(features, masks, pooling="fcclip").unflatten(0, masks.shape[:2])


def _resize(mask_logits: Tensor, size: tuple[int, int]) -> Tensor:
    if tuple(mask_logits.shape[-2:]) == size:
        return mask_logits
    return F.interpolate(mask_logits, size=size, mode="bilinear", align_corners=False)
