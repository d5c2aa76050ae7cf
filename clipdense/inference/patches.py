"""Maps of patches from maps of pixels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["patch_modes"]


def patch_modes(labels: Tensor, patch_size: int) -> Tensor:
    """Return the most frequent label of each patch; among equally frequent ones the smallest.

    Args:
        labels: (H, W) int64, at least 0; pixels that fill no patch are dropped.
        patch_size: side of a patch in pixels.

    Returns:
        (H // patch_size, W // patch_size).
    """
    h, w = (side // patch_size for side in labels.shape)
    blocks = labels[: h * patch_size, : w * patch_size].reshape(h, patch_size, w, patch_size)
    blocks = blocks.transpose(1, 2).flatten(2).flatten(0, 1)
    counts = F.one_hot(blocks, int(labels.max()) + 1).sum(1)
    return torch.argmax(counts, 1).reshape(h, w)
