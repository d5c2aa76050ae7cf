"""Classification in which classes without labels do not compete."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["known_class_logits", "open_vocabulary_loss"]


def known_class_logits(logits: Tensor, class_weight: Tensor) -> Tensor:
    """Logits (R, K + 1) with -inf for the classes whose weight (K + 1,) is 0."""
    return logits.masked_fill(class_weight == 0, -torch.inf)


def open_vocabulary_loss(logits: Tensor, labels: Tensor, class_weight: Tensor) -> Tensor:
    """Cross-entropy over the known classes and the background (F-ViT,
    specs/clipself_fvlm_catseg_odise_fcclip.md 2.2).

    Novel classes leave the softmax, so that nothing pushes regions away from them. Losses are weighted by
    class, but divided by the number of regions, not by the sum of weights.

    Args:
        logits: (R, K + 1), the background last.
        labels: (R,) in 0 .. K; a region of a class of weight 0 has no loss.
        class_weight: (K + 1,), 0 for novel classes.

    Returns:
        Scalar; 0 without regions.
    """
    losses = F.cross_entropy(known_class_logits(logits, class_weight), labels, reduction="none")
    weight = class_weight[labels]
    return torch.where(weight > 0, losses * weight, 0).sum() / max(1, len(labels))
