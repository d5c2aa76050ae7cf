"""Classification loss in which novel classes do not compete."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["mask_novel_logits", "open_vocabulary_loss"]


def mask_novel_logits(logits: Tensor, class_weight: Tensor) -> Tensor:
    """Set the logits (R, K + 1) of classes with weight (K + 1,) 0 to -inf."""
    return logits.masked_fill(class_weight == 0, -torch.inf)


def open_vocabulary_loss(logits: Tensor, labels: Tensor, class_weight: Tensor) -> Tensor:
    """Compute the cross-entropy over base classes and background (F-ViT, Wu et al., CLIPSelf, ICLR 2024).

    Novel classes are left out of the softmax, so that no gradient pushes regions away from them. Losses are
    weighted by class and divided by the number of regions, not by the sum of weights, as in the published
    code.

    Args:
        logits: (R, K + 1), the background last.
        labels: (R,) int64, 0 to K; a region whose class has weight 0 has no loss.
        class_weight: (K + 1,), 0 for novel classes.

    Returns:
        Scalar; 0 without regions.
    """
    losses = F.cross_entropy(mask_novel_logits(logits, class_weight), labels, reduction="none")
    weight = class_weight[labels]
    return torch.where(weight > 0, losses * weight, 0).sum() / max(1, len(labels))
