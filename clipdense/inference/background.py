"""Rules for pixels and classes that a vocabulary does not cover."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["max_over_synonyms", "reject_pixels", "suppress_absent_classes"]


def max_over_synonyms(scores: Tensor, classes: Tensor, num_classes: int) -> Tensor:
    """Reduce the maps of names to maps of classes by their maximum (SCLIP, Wang et al., ECCV 2024, for the
    many names of its background).

    Args:
        scores: (N, ...) maps of names.
        classes: (N,) int64, the class of each name.
        num_classes: K.

    Returns:
        (K, ...); -inf for a class without a name.
    """
    reduced = scores.new_full((num_classes, *scores.shape[1:]), -torch.inf)
    return reduced.index_reduce(0, classes, scores, "amax")


def suppress_absent_classes(scores: Tensor, threshold: float) -> Tensor:
    """Set the maps of absent classes to -inf: classes that no pixel scores at least `threshold` (the prompt
    denoising of MaskCLIP, Zhou et al., ECCV 2022, section 3.3).

    Args:
        scores: (K, H, W).
        threshold: Least score of the best pixel of a class that is present. If no class reaches it, the maps
            stay as they are.
    """
    absent = scores.flatten(1).amax(1) < threshold
    return scores.masked_fill((absent & ~absent.all())[:, None, None], -torch.inf)


def reject_pixels(labels: Tensor, scores: Tensor, threshold: float | Tensor, background: int) -> Tensor:
    """Label pixels of low confidence as background (the probability threshold of GroupViT, Xu et al., CVPR
    2022, TCL and SCLIP).

    Args:
        labels: (H, W) int64, the best class of each pixel.
        scores: (H, W), its score.
        threshold: Score below which a pixel is background; or (K,), one for each class.
        background: Label of the background, a class or the void label.
    """
    if isinstance(threshold, Tensor):
        threshold = threshold[labels]
    return labels.masked_fill(scores < threshold, background)
