"""Region proposals and the selection of detections, with shapes that do not depend on values.

Detectron2 selects by boolean masks. Here every selection has a fixed number of rows, and flags tell which of
them exist; the existing rows are the same, in the same order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import nms

from clipdense.backbone import AnyStridePooler
from clipdense.clip.roi_align import roi_align
from clipdense.systems.fvlm.rpn import ProbabilityRPN

from detectron2.modeling.poolers import ROIPooler, assign_boxes_to_levels
from detectron2.modeling.proposal_generator import RPN
from detectron2.structures import Boxes

__all__ = ["best_rows", "clip_boxes", "pool_rows", "propose", "select_detections"]

_NOTHING = -1e30  # score of rows that do not exist; infinity would turn into NaN in sums


def propose(rpn: RPN, features: dict[str, Tensor], image_size: Tensor) -> tuple[Tensor, Tensor]:
    """Propose regions of one image, as Detectron2's RPN does in evaluation.

    Args:
        rpn: the proposal generator.
        features: maps (1, C, h, w) by name.
        image_size: (2,) int64, height and width without padding.

    Returns:
        Boxes (R, 4) xyxy, best first, and flags (R,) bool of the boxes that exist.
    """
    generator: Any = rpn
    maps = [features[name] for name in generator.in_features]
    anchors = [boxes.tensor for boxes in generator.anchor_generator(maps)]
    logits, deltas = generator.rpn_head(maps)
    limit, count = generator.pre_nms_topk[False], generator.post_nms_topk[False]
    candidates = []
    for level, (anchor, logit, delta) in enumerate(zip(anchors, logits, deltas, strict=True)):
        scores = logit.permute(0, 2, 3, 1).flatten()
        scores = scores.sigmoid() if isinstance(rpn, ProbabilityRPN) else scores
        delta = delta[0].unflatten(0, (-1, 4)).permute(2, 3, 0, 1).flatten(0, 2)
        boxes = generator.box2box_transform.apply_deltas(delta, anchor)
        # a level may have fewer anchors than the limit
        scores, boxes = F.pad(scores, (0, limit), value=_NOTHING), F.pad(boxes, (0, 0, 0, limit))
        scores, index = scores.topk(limit)
        candidates.append((boxes[index], scores, torch.full_like(index, level)))
    boxes, scores, levels = (torch.cat(parts) for parts in zip(*candidates, strict=True))
    finite = boxes.isfinite().all(1) & scores.isfinite()
    boxes = clip_boxes(boxes, image_size)
    sides = boxes[:, 2:] - boxes[:, :2]
    exists = finite & (scores > _NOTHING / 2) & (sides > generator.min_box_size).all(1)
    rows, kept = best_rows(boxes, scores, levels, exists, generator.nms_thresh, min(count, len(boxes)))
    return boxes[rows], kept


def best_rows(
    boxes: Tensor, scores: Tensor, groups: Tensor, exists: Tensor, overlap: float, count: int
) -> tuple[Tensor, Tensor]:
    """Select the best boxes after non-maximum suppression within each group.

    Args:
        boxes: (N, 4).
        scores: (N,).
        groups: (N,) int64; boxes of different groups do not suppress each other.
        exists: (N,) bool.
        overlap: intersection over union above which the worse box is removed.
        count: number of rows to return, at most N.

    Returns:
        Indices (count,) by descending score, and flags (count,) bool of the rows that exist.
    """
    boxes = torch.where(exists[:, None], boxes, 0.0)
    # topk of all rows, as ONNX has no stable sort
    order = torch.where(exists, scores, _NOTHING).topk(len(scores)).indices
    apart = boxes + (groups * (boxes.max() + 1))[:, None].to(boxes)
    places = torch.arange(len(boxes), device=boxes.device)
    ranks = (len(boxes) - places).to(boxes)  # the order as scores without ties
    found = nms(apart[order], ranks, overlap)
    survives = torch.zeros_like(exists).index_fill(0, found, True) & exists[order]
    # survivors first, each part in its order
    chosen = (places + torch.where(survives, 0, len(boxes))).topk(count, largest=False).indices
    return order[chosen], survives[chosen]


def pool_rows(pooler: ROIPooler | AnyStridePooler, maps: Sequence[Tensor], boxes: Tensor) -> Tensor:
    """Pool boxes of one image from the levels that match their sizes, as the pooler does.

    Every level pools all rows, those of other levels from an empty box, which costs little.

    Args:
        pooler: Detectron2's or ours.
        maps: (1, C, h, w) of the levels.
        boxes: (N, 4) in pixels.

    Returns:
        (N, C, side, side).
    """
    rois = F.pad(boxes, (1, 0))  # all of image 0

    def pool(level: int, rows: Tensor) -> Tensor:
        if isinstance(pooler, AnyStridePooler):
            scale, ratio = 1 / pooler.strides[level], pooler.sampling_ratio
            return roi_align(maps[level], rows, pooler.output_size, scale=scale, sampling_ratio=ratio)
        pooled: Tensor = pooler.level_poolers[level](maps[level], rows)
        return pooled

    if len(maps) == 1:
        return pool(0, rois)
    if isinstance(pooler, AnyStridePooler):
        levels = pooler.levels(boxes)
    else:
        rule = pooler.min_level, pooler.max_level, pooler.canonical_box_size, pooler.canonical_level
        levels = assign_boxes_to_levels([Boxes(boxes)], *rule)
    parts = []
    for level in range(len(maps)):
        own = levels == level
        cells = pool(level, torch.where(own[:, None], rois, 0.0))
        parts.append(torch.where(own[:, None, None, None], cells, 0.0))
    return torch.stack(parts).sum(0)


def clip_boxes(boxes: Tensor, image_size: Tensor) -> Tensor:
    """Clip boxes (..., 4) to an image of (height, width)."""
    limit = image_size.flip(0).to(boxes).repeat(2)
    return torch.minimum(boxes.clamp(min=0), limit)


def select_detections(
    boxes: Tensor,
    scores: Tensor,
    exists: Tensor,
    *,
    threshold: float,
    overlap: float,
    limit: int,
    candidates: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Select detections: score threshold, non-maximum suppression within each class, and a limit.

    Args:
        boxes: (R, 4) shared by the classes, or (R, K, 4).
        scores: (R, K).
        exists: (R,) bool.
        threshold: score that a detection must exceed.
        overlap: see `best_rows`.
        limit: number D of detections.
        candidates: number of best (box, class) pairs that suppression sees.

    Returns:
        Boxes (D, 4), scores (D,), 0 where there is no further detection, and classes (D,).
    """
    classes = scores.shape[1]
    flat = torch.where(exists[:, None], scores, 0.0).flatten()
    best, index = F.pad(flat, (0, candidates), value=_NOTHING).topk(candidates)
    real = best > max(threshold, 0.0)
    index = torch.where(real, index, 0)
    # a tensor, as the ONNX operators take no number of classes that is not constant
    width = torch.full_like(index, classes)
    rows = index // width
    columns = index - rows * width
    found = boxes[rows] if boxes.dim() == 2 else boxes[rows, columns]
    real = real & found.isfinite().all(1)
    chosen, kept = best_rows(found, best, columns, real, overlap, limit)
    return found[chosen], torch.where(kept, best[chosen], 0.0), columns[chosen]
