"""Non-maximum suppression per class whose cost does not grow with the number of classes."""

from __future__ import annotations

from torch import Tensor
from torchvision.ops import nms

__all__ = ["class_nms"]

_CHUNK = 4  # candidates that are looked at first, for each detection that is wanted


def class_nms(
    boxes: Tensor, scores: Tensor, *, threshold: float, iou: float, limit: int
) -> tuple[Tensor, Tensor]:
    """The best (box, class) pairs after non-maximum suppression within each class.

    Equal to suppressing all pairs and cutting the result, but candidates come in by falling score until
    `limit` of them have survived: whether a pair survives depends on better pairs only.

    Args:
        boxes: (R, 4) xyxy, shared by all classes.
        scores: (R, K).
        threshold: pairs must score above it.
        iou: a pair goes when a better one of its class overlaps by more.
        limit: pairs to give at most; negative for all.

    Returns:
        Index of the box and class, each (n,), by falling score.
    """
    flat = scores.flatten()
    total = int((flat > threshold).sum())
    count = total if limit < 0 else _CHUNK * max(limit, 1)
    while True:
        best = flat.topk(min(count, total)).indices
        row, column = best // scores.shape[1], best % scores.shape[1]
        # Classes apart by more than any box reaches; float64 keeps the boxes exact however many there are.
        candidates = boxes[row].double()
        apart = (candidates.max() - candidates.min() + 1) * column if len(row) else column
        kept = nms(candidates + apart[:, None], flat[best].double(), iou)
        if count >= total or len(kept) >= limit:
            kept = kept if limit < 0 else kept[:limit]
            return row[kept], column[kept]
        count *= 4
