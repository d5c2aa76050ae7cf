"""From class scores of masks to a semantic map."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from clipdense.regions.fusion import calibrated_stacking

__all__ = ["best_masks", "semantic_labels", "semantic_map"]

_BUDGET = 2**25  # bytes of class maps that are held at a time


def semantic_map(
    scores: Tensor,
    masks: Tensor,
    size: tuple[int, int],
    *,
    base: Tensor | None = None,
    calibration: float = 0.0,
) -> Tensor:
    """S_k = sum over q of P_qk M_q, resized bilinearly (MaskFormer, Cheng et al., NeurIPS 2021, section 3.4).

    Args:
        scores: P (Q, K), without background.
        masks: M (Q, h, w), 0 .. 1.
        size: (H, W) of the result.
        base, calibration: see `calibrated_stacking`.

    Returns:
        (K, H, W).
    """
    maps = (scores.T @ masks.flatten(1)).view(-1, *masks.shape[1:])
    if maps.shape[1:] != tuple(size):
        maps = F.interpolate(maps[None], size, mode="bilinear", align_corners=False)[0]
    return calibrated_stacking(maps, base, calibration)


def semantic_labels(
    scores: Tensor,
    masks: Tensor,
    size: tuple[int, int],
    *,
    base: Tensor | None = None,
    calibration: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """The best class of every pixel of `semantic_map`, for vocabularies whose maps would fill the memory:
    they are made and compared a few classes at a time.

    Returns:
        (H, W) int64 classes, and their scores (H, W).
    """
    largest = max(masks[0].numel(), size[0] * size[1])
    step = max(1, _BUDGET // (largest * scores.element_size()))
    labels = torch.zeros(size, dtype=torch.long, device=scores.device)
    top = scores.new_full(size, -torch.inf)
    for start in range(0, scores.shape[1], step):
        part = slice(start, start + step)
        known = None if base is None else base[part]
        maps = semantic_map(scores[:, part], masks, size, base=known, calibration=calibration)
        best, index = maps.max(0)
        labels = torch.where(best > top, index + start, labels)
        top = torch.maximum(best, top)
    return labels, top


def best_masks(scores: Tensor, background: int | None = None) -> Tensor:
    """(Q,) bool: which masks are some class's best one (OVSeg's demo, spec 2.5).

    Args:
        scores: (Q, K).
        background: a class that stands for "anything else" and gets no mask of its own.
    """
    best = scores.argmax(0)
    wanted = torch.arange(scores.shape[1], device=scores.device) != (-1 if background is None else background)
    return torch.zeros(len(scores), dtype=torch.bool, device=scores.device).index_fill(0, best[wanted], True)
