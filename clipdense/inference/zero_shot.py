"""From cosines between patches and names to class scores and labels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from clipdense.inference.background import max_over_synonyms

__all__ = [
    "class_probabilities",
    "confident_labels",
    "denoise_prompts",
    "smooth_by_keys",
    "suppress_small_classes",
    "text_cosines",
]


def text_cosines(dense: Tensor, text: Tensor) -> Tensor:
    """Compare a dense map (B, D, h, w) with L2-normalised text embeddings (S, D): cosines (B, S, h, w)."""
    return torch.einsum("bdhw,sd->bshw", F.normalize(dense, dim=1), text.to(dense))


def class_probabilities(logits: Tensor, classes: Tensor, num_classes: int, scale: float) -> Tensor:
    """Compute class scores: softmax over all names, then the maximum over the names of a class.

    Args:
        logits: (S, ...) cosines of the names.
        classes: (S,) int64, the class of each name.
        num_classes: K.
        scale: factor of the cosines in the softmax.

    Returns:
        (K, ...) in 0..1, whose sum is less than 1 if classes have several names; 0 for a class without a
        name.

    Source: SCLIP (Wang et al., ECCV 2024), released code.
    """
    probabilities = (scale * logits).softmax(0)
    if len(classes) == num_classes and bool((classes == torch.arange(num_classes).to(classes)).all()):
        return probabilities
    return max_over_synonyms(probabilities, classes, num_classes).clamp_(min=0)


def suppress_small_classes(scores: Tensor, share: float, background: int = 0) -> Tensor:
    """Set the maps of classes with a small area to 0.

    Args:
        scores: (K, H, W).
        share: a foreground class keeps its map if it is the best class of more than this share of the pixels
            whose best class is a foreground class.
        background: class that always keeps its map.

    Source: SCLIP (Wang et al., ECCV 2024), released code ("area_thd").
    """
    counts = torch.bincount(scores.argmax(0).flatten(), minlength=len(scores)).float()
    foreground = torch.arange(len(scores), device=scores.device) != background
    small = foreground & (counts <= share * counts[foreground].sum())
    return scores.masked_fill(small[:, None, None], 0)


def confident_labels(scores: Tensor, threshold: float, background: int = 0) -> Tensor:
    """Return the best class (H, W) of each pixel; where its score is below the threshold, the background.

    Args:
        scores: (K, H, W).
        threshold: 0 labels every pixel.
        background: label of the other pixels: a class, or -1 for none.
    """
    best, labels = scores.max(0)
    return labels.masked_fill(best < threshold, background)


def denoise_prompts(
    logits: Tensor, threshold: float, *, scale: float = 100.0, absent: float = -100.0
) -> Tensor:
    """Set the cosines of classes that no patch scores at least ``threshold`` to a constant.

    Args:
        logits: (B, K, h, w) cosines; each image is decided alone.
        threshold: of the largest softmax(scale logits) of a class.
        scale: see above.
        absent: the constant.

    Source: MaskCLIP (Zhou et al., ECCV 2022), section 3.3 ("prompt denoising").
    """
    best = (scale * logits).softmax(1).amax((2, 3), keepdim=True)
    return logits.masked_fill(best < threshold, absent)


def smooth_by_keys(
    logits: Tensor,
    keys: Tensor,
    threshold: float,
    *,
    scale: float = 100.0,
    normalize_tokens: bool = False,
) -> Tensor:
    """Replace the probabilities of unsure patches by sums over all patches, weighted by similar keys.

    p = softmax(scale logits); where max p < threshold, p_i <- sum over j of W_ij p_j with the cosines W of
    the keys, which may be negative and are not normalised.

    Args:
        logits: (B, K, h, w) cosines.
        keys: (B, C, h, w) of the last attention.
        threshold: 1 replaces all patches.
        scale: see above.
        normalize_tokens: divide each channel of the keys by its norm over the patches, as the released code
            does, instead of each key by its norm over the channels.

    Returns:
        (B, K, h, w), probabilities and sums of them.

    Source: MaskCLIP (Zhou et al., ECCV 2022), section 3.3 ("key smoothing").
    """
    p = (scale * logits).softmax(1).flatten(2)
    k = F.normalize(keys.flatten(2), dim=2 if normalize_tokens else 1)
    smoothed = p @ (k.transpose(1, 2) @ k).transpose(1, 2)
    unsure = p.amax(1, keepdim=True) < threshold
    return torch.where(unsure, smoothed, p).reshape(logits.shape)
