"""The rules of MaskCLIP+'s labels, as functions of label maps and scores."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["UNLABELLED", "fill_labels", "hardest_pixels", "pseudo_labels", "suppress_labels"]

UNLABELLED = -1
"""Label of a pixel that is to be labelled by a model."""


def suppress_labels(labels: Tensor, classes: Sequence[int]) -> Tensor:
    """Return labels (H, W) in which the pixels of some classes are `UNLABELLED`."""
    hidden = torch.isin(labels, torch.tensor(list(classes), device=labels.device))
    return labels.masked_fill(hidden, UNLABELLED)


def pseudo_labels(scores: Tensor, classes: Sequence[int], min_score: float = 0.0) -> Tensor:
    """Label pixels by the best of some classes.

    Args:
        scores: (C, H, W) of these classes.
        classes: their C labels.
        min_score: pixels whose best score is lower are `UNLABELLED`; 0: none.

    Returns:
        (H, W) int64.
    """
    best, index = scores.max(0)
    labels = torch.tensor(list(classes), device=scores.device)[index]
    return labels.masked_fill(best < min_score, UNLABELLED) if min_score else labels


def fill_labels(labels: Tensor, found: Tensor, ignore_value: int) -> Tensor:
    """Replace `UNLABELLED` pixels by the labels found for them; those that have none are ignored."""
    filled = torch.where(labels == UNLABELLED, found, labels)
    return filled.masked_fill(filled == UNLABELLED, ignore_value)


def hardest_pixels(
    logits: Tensor, targets: Tensor, *, threshold: float, min_kept: int, ignore_value: int = 255
) -> Tensor:
    """Select the pixels for the loss: online hard example mining.

    Kept are the labelled pixels whose true class has a probability below max(threshold, p), with p the
    probability of the pixel number ``min_kept`` x B in ascending order, or the largest if there are fewer.

    Args:
        logits: (B, K, H, W).
        targets: (B, H, W) labels.
        threshold: probability in 0..1.
        min_kept: pixels per image.
        ignore_value: label of pixels that are never kept.

    Returns:
        (B, H, W) bool.

    Source: Shrivastava et al., CVPR 2016, with the rule that semantic segmentation uses (PSPNet, OCNet).
    """
    labelled = targets != ignore_value
    with torch.no_grad():
        index = targets.masked_fill(~labelled, 0)[:, None]
        probability = logits.softmax(1).gather(1, index)[:, 0]
        ordered = probability[labelled].sort().values
        if not len(ordered):
            return labelled
        limit = ordered[min(min_kept * len(logits), len(ordered) - 1)].clamp(min=threshold)
        return labelled & (probability < limit)


def labelled_cross_entropy(logits: Tensor, targets: Tensor, kept: Tensor) -> Tensor:
    """Average the cross-entropy of logits (B, K, H, W) over the kept pixels (B, H, W); 0 if none is."""
    losses = F.cross_entropy(logits, targets.masked_fill(~kept, 0), reduction="none")
    return (losses * kept).sum() / kept.sum().clamp(min=1)
