"""Non-maximum suppression within each class, at a cost that does not grow with the number of classes."""

from __future__ import annotations

from torch import Tensor
from torchvision.ops import nms

__all__ = ["class_nms"]

_CHUNK = 4  # candidates of the first round per requested detection


def class_nms(
    boxes: Tensor, scores: Tensor, *, threshold: float, iou: float, limit: int
) -> tuple[Tensor, Tensor]:
    """Select the best (box, class) pairs after non-maximum suppression within each class.

    The result equals suppressing all pairs and keeping the first `limit`. Only the best-scoring candidates
    are read, as many as it takes until `limit` survive: survival depends on better pairs only.

    Args:
        boxes: (R, 4) xyxy, shared by all classes.
        scores: (R, K).
        threshold: Score that a pair must exceed.
        iou: Overlap with a better pair of the same class above which a pair is removed.
        limit: Maximum number of pairs; negative: all.

    Returns:
        Index of the box (n,) and of the class (n,), in descending order of score.
    """
    flat = scores.flatten()
    total = int((flat > threshold).sum())
    count = total if limit < 0 else _CHUNK * max(limit, 1)
    while True:
        best = flat.topk(min(count, total)).indices
        row, column = best // scores.shape[1], best % scores.shape[1]
        # Shift the boxes of each class beyond all others; float64 keeps them exact for any number of classes.
        candidates = boxes[row].double()
        apart = (candidates.max() - candidates.min() + 1) * column if len(row) else column
        kept = nms(candidates + apart[:, None], flat[best].double(), iou)
        if count >= total or len(kept) >= limit:
            kept = kept if limit < 0 else kept[:limit]
            return row[kept], column[kept]
        count *= 4
