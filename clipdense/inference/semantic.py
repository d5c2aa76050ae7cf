"""Semantic segmentation from the class scores and masks of queries."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from clipdense.regions.fusion import calibrated_stacking
from clipdense.regions.lazy_maps import LazyMaps

__all__ = [
    "best_masks",
    "merge_class_maps",
    "semantic_labels",
    "semantic_map",
    "semantic_output",
    "top_labels",
]

_BUDGET = 2**25  # bytes of class maps that `semantic_labels` holds at a time


def semantic_map(
    scores: Tensor,
    masks: Tensor | LazyMaps,
    size: tuple[int, int],
    *,
    base: Tensor | None = None,
    calibration: float = 0.0,
) -> Tensor:
    """Compute class maps S_k = sum over q of P_qk M_q (MaskFormer, Cheng et al., NeurIPS 2021, section 3.4).

    Args:
        scores: P (Q, K), class scores without background.
        masks: M (Q, h, w), mask probabilities in 0 .. 1.
        size: Height and width of the result, to which maps are resized bilinearly.
        base: (K,) bool, the classes whose maps are calibrated; None: no class.
        calibration: Amount subtracted from the resized maps of base classes (ZegFormer); see
            `calibrated_stacking`.

    Returns:
        (K, H, W).
    """
    return _class_maps(scores, masks, size, base, calibration).compute()


def semantic_labels(
    scores: Tensor,
    masks: Tensor | LazyMaps,
    size: tuple[int, int],
    *,
    base: Tensor | None = None,
    calibration: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Find the best class of each pixel of `semantic_map` without holding the maps of all classes.

    Same arguments as `semantic_map`. Maps are computed and compared a few rows at a time.

    Returns:
        Labels (H, W) int64 and their scores (H, W).
    """
    return top_labels(_class_maps(scores, masks, size, base, calibration))


def semantic_output(maps: LazyMaps, *, max_classes: int = 0, max_bytes: int = 0) -> dict[str, Tensor]:
    """Make the semantic output of one image from its class maps.

    Args:
        maps: (K, H, W).
        max_classes: Number of classes above which the output is labels; 0: no limit.
        max_bytes: The same as a number of bytes of the maps; 0: no limit.

    Returns:
        ``sem_seg`` (K, H, W), or ``sem_seg_labels`` (H, W) int64 above a limit.
    """
    classes, height, width = maps.shape
    needed = classes * height * width * maps.source.element_size()
    if any(0 < limit < value for limit, value in ((max_classes, classes), (max_bytes, needed))):
        return {"sem_seg_labels": top_labels(maps)[0]}
    return {"sem_seg": maps.compute()}


def top_labels(maps: LazyMaps) -> tuple[Tensor, Tensor]:
    """Find the best class of each pixel of class maps (K, H, W), a few rows at a time.

    Returns:
        Labels (H, W) int64 and their scores (H, W).
    """
    size = maps.shape[1:]
    labels = torch.zeros(size, dtype=torch.long, device=maps.device)
    top = maps.source.new_full(size, -torch.inf)
    for band in maps.bands(_BUDGET, _BUDGET):
        top[band], labels[band] = maps.rows(band.start, band.stop).max(0)
    return labels, top


def _class_maps(
    scores: Tensor, masks: Tensor | LazyMaps, size: tuple[int, int], base: Tensor | None, calibration: float
) -> LazyMaps:
    def mix(masks: Tensor) -> Tensor:
        return (scores.T @ masks.flatten(1)).view(-1, *masks.shape[1:])

    maps = LazyMaps.of(masks).apply(mix, channels=scores.shape[1]).resize(size)
    if base is None or calibration <= 0:
        return maps
    return maps.apply(lambda maps: calibrated_stacking(maps, base, calibration))


def merge_class_maps(
    maps: Callable[[slice], Tensor],
    num_classes: int,
    size: tuple[int, int],
    *,
    chunk: int,
    max_dense_classes: int = 0,
    max_dense_bytes: int = 0,
) -> dict[str, Tensor]:
    """Merge maps that are computed a few classes at a time to the output of a segmentation model.

    Args:
        maps: From a range of n classes to their scores (n, *size).
        num_classes: K.
        size: Height and width of the result.
        chunk: Number of classes at a time, at least 1.
        max_dense_classes: Number of classes above which the result has labels instead of one map per class;
            0: no limit.
        max_dense_bytes: The same as a number of bytes of the maps; 0: no limit.

    Returns:
        ``sem_seg`` (K, *size), or ``sem_seg_labels`` (*size) int64, the first of the best classes. No more
        than ``chunk`` maps exist besides the result.
    """
    parts = [slice(start, min(start + chunk, num_classes)) for start in range(0, num_classes, chunk)]
    limits = ((max_dense_classes, num_classes), (max_dense_bytes, 4 * num_classes * size[0] * size[1]))
    first = maps(parts[0])
    if not any(0 < limit < value for limit, value in limits):
        result = first.new_empty(num_classes, *size)
        result[parts[0]] = first
        for part in parts[1:]:
            result[part] = maps(part)
        return {"sem_seg": result}
    top, labels = first.max(0)
    for part in parts[1:]:
        score, label = maps(part).max(0)
        better = score > top
        top, labels = torch.where(better, score, top), torch.where(better, label + part.start, labels)
    return {"sem_seg_labels": labels}


def best_masks(scores: Tensor, background: int | None = None) -> Tensor:
    """Find the masks that are the best mask of at least one class (OVSeg's demo, Liang et al., CVPR 2023).

    Args:
        scores: (Q, K) class scores.
        background: A class for everything else, which selects no mask; None: every class selects one.

    Returns:
        (Q,) bool.
    """
    best = scores.argmax(0)
    if background is not None:
        best = torch.cat([best[:background], best[background + 1 :]])
    return torch.zeros(len(scores), dtype=torch.bool, device=scores.device).index_fill(0, best, True)
