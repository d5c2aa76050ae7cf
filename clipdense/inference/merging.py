"""From classes and masks of queries to semantic, panoptic and instance segmentation of one image."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from detectron2.structures import Boxes, Instances

__all__ = ["instance_inference", "panoptic_inference", "semantic_inference", "tight_boxes"]


def semantic_inference(logits: Tensor, masks: Tensor) -> Tensor:
    """Class scores of pixels (MaskFormer, section 3.4): logits (Q, K + 1), mask logits (Q, H, W) ->
    (K, H, W)."""
    return torch.einsum("qk,qhw->khw", logits.softmax(dim=1)[:, :-1], masks.sigmoid())


def panoptic_inference(
    logits: Tensor,
    masks: Tensor,
    things: Collection[int],
    *,
    object_mask_threshold: float = 0.8,
    overlap_threshold: float = 0.8,
    pixel_threshold: float = 0.0,
) -> tuple[Tensor, list[dict[str, Any]]]:
    """Segments without overlap (MaskFormer, section 3.4).

    Each pixel goes to the query with the greatest product of class and mask probability, among those above
    ``object_mask_threshold``. A query that wins too little of its mask is rejected, and its pixels are void.

    Args:
        logits: (Q, K + 1).
        masks: mask logits (Q, H, W).
        things: classes whose queries are segments of their own; those of another class are merged.
        object_mask_threshold: class probability that a query must exceed.
        overlap_threshold: least ratio of the pixels that a query wins to those inside its mask (>= 0.5).
        pixel_threshold: mask probability that a pixel needs to belong to the query that wins it: 0 in
            MaskFormer, 0.5 in Mask2Former.

    Returns:
        Segment ids (H, W) int32 from 1 in the order of queries, 0 for void; and their ``id``,
        ``category_id``, ``isthing``.
    """
    no_object = logits.shape[1] - 1
    scores, labels = logits.softmax(dim=1).max(dim=1)
    kept = (labels != no_object) & (scores > object_mask_threshold)
    scores, labels, probabilities = scores[kept], labels[kept].cpu(), masks[kept].sigmoid()
    if not len(labels):
        return torch.zeros(masks.shape[-2:], dtype=torch.int32, device=masks.device), []
    best = (scores[:, None, None] * probabilities).argmax(dim=0)
    sure = probabilities.gather(0, best[None])[0] >= pixel_threshold
    won = best.flatten().bincount(minlength=len(labels)).cpu()
    owned = best[sure].bincount(minlength=len(labels)).cpu()
    inside = (probabilities >= 0.5).sum(dim=(1, 2)).cpu()
    accepted = (owned > 0) & (inside > 0) & (won.double() / inside >= overlap_threshold)

    # the first accepted query of a stuff class opens the segment that the later ones join
    is_thing = torch.isin(labels, torch.tensor(sorted(things), dtype=labels.dtype))
    joins = (labels[:, None] == labels) & ~is_thing & accepted
    joins |= torch.eye(len(labels), dtype=torch.bool)
    first = joins.int().argmax(dim=1)
    opens = accepted & (first == torch.arange(len(labels)))
    ids = (opens.cumsum(0)[first] * accepted).int()
    segments = [
        {"id": i, "category_id": label, "isthing": thing}
        for i, label, thing in zip(
            ids[opens].tolist(), labels[opens].tolist(), is_thing[opens].tolist(), strict=True
        )
    ]
    return ids.to(best.device)[best] * sure, segments


def instance_inference(
    logits: Tensor, masks: Tensor, *, topk: int = 100, things: Collection[int] | None = None
) -> Instances:
    """The best pairs of query and class (Mask2Former): one query may be several instances.

    Args:
        logits: (Q, K + 1).
        masks: mask logits (Q, H, W).
        topk: number of pairs.
        things: keep only instances of these classes; None keeps all.

    Returns:
        ``pred_masks`` (N, H, W) bool, ``pred_boxes`` around them, ``pred_classes``, and ``scores``: the class
        probability times the mean mask probability inside the mask.
    """
    probabilities = logits.softmax(dim=1)[:, :-1]
    scores, index = probabilities.flatten().topk(min(topk, probabilities.numel()), sorted=False)
    query, label = index // probabilities.shape[1], index % probabilities.shape[1]
    if things is not None:
        wanted = torch.isin(label, torch.tensor(sorted(things), dtype=label.dtype, device=label.device))
        scores, query, label = scores[wanted], query[wanted], label[wanted]
    binary = masks > 0
    certainty = (masks.sigmoid() * binary).sum(dim=(1, 2)) / (binary.sum(dim=(1, 2)) + 1e-6)
    instances = Instances(tuple(masks.shape[-2:]))
    instances.pred_masks = binary[query]
    instances.pred_boxes = Boxes(tight_boxes(binary)[query])
    instances.scores = scores * certainty[query]
    instances.pred_classes = label
    return instances


def tight_boxes(masks: Tensor) -> Tensor:
    """Masks (N, H, W) bool -> boxes (N, 4) float32 x0, y0, x1, y1 around them, ends exclusive; zeros around
    nothing."""
    sides = []
    for along in (masks.any(dim=1), masks.any(dim=2)):  # (N, W), (N, H)
        first = along.int().argmax(dim=1)
        last = along.shape[1] - along.flip(1).int().argmax(dim=1)
        sides.append((first, last * along.any(dim=1)))
    (x0, x1), (y0, y1) = sides
    return torch.stack([x0, y0, x1, y1], dim=1).float()
