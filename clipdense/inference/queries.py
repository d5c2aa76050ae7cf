"""Segmentation of one image from the class scores and masks of its queries."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from clipdense.inference.semantic import best_masks, semantic_labels, semantic_map
from clipdense.regions.boxes import tight_boxes
from clipdense.regions.lazy_maps import LazyMaps

from detectron2.structures import Boxes, Instances

__all__ = ["MergeSettings", "instance_inference", "merge_queries", "panoptic_inference"]


@dataclass(frozen=True)
class MergeSettings:
    """Outputs of a mask classification model, and the published rules that make them.

    Attributes:
        semantic_on: Output semantic segmentation.
        panoptic_on: Output panoptic segmentation.
        instance_on: Output instances.
        things_only: Instances: of things only; always with `panoptic_on`.
        proposals_on: Output the mask probabilities of all queries.
        object_mask_threshold: Panoptic: see `panoptic_inference`.
        overlap_threshold: Panoptic: see `panoptic_inference`.
        pixel_threshold: Panoptic: see `panoptic_inference`.
        topk: Instances: maximum number per image.
        resize_masks_first: Semantic: resize mask logits to the output instead of class maps (MaskFormer's
            SEM_SEG_POSTPROCESSING_BEFORE_INFERENCE).
        best_masks: Semantic: use the best mask of each class only, binarised (OVSeg's demo).
        best_mask_threshold: Probability above which a pixel is inside a best mask.
        calibration: Semantic: amount subtracted from the maps of base classes (ZegFormer: 0.1).
        max_dense_classes: Semantic: number of classes above which the output has labels instead of one map
            per class; 0: no limit.
        max_dense_bytes: Semantic: the same as a number of bytes of the maps; 0: no limit.
    """

    semantic_on: bool = True
    panoptic_on: bool = False
    instance_on: bool = False
    things_only: bool = False
    proposals_on: bool = False
    object_mask_threshold: float = 0.8
    overlap_threshold: float = 0.8
    pixel_threshold: float = 0.0
    topk: int = 100
    resize_masks_first: bool = False
    best_masks: bool = False
    best_mask_threshold: float = 0.5
    calibration: float = 0.0
    max_dense_classes: int = 0
    max_dense_bytes: int = 0


def merge_queries(
    scores: Tensor,
    mask_logits: Tensor | LazyMaps,
    settings: MergeSettings,
    *,
    image_size: tuple[int, int],
    output_size: tuple[int, int],
    things: Collection[int] = (),
    base: Tensor | None = None,
) -> dict[str, Any]:
    """Merge the queries of one image to the enabled outputs.

    Masks at the output's size are computed a few rows or queries at a time. At most one output's result and
    about 200 MiB are held besides.

    Args:
        scores: (Q, K + 1) class scores, background last. Panoptic and instance segmentation normalise each
            row to a sum of 1; semantic segmentation takes the scores as they are.
        mask_logits: (Q, H, W) of the padded image.
        settings: The outputs and their rules.
        image_size: Height and width of the image without padding.
        output_size: Height and width of the outputs.
        things: Classes of countable things.
        base: (K,) bool, the base classes, if they are calibrated.

    Returns:
        The enabled outputs among ``proposal_masks`` (Q, h, w) probabilities at the image's size; ``sem_seg``
        (K, H, W), or ``sem_seg_labels`` (H, W) of a large vocabulary or image; ``panoptic_seg`` (ids (H, W)
        int32, segments); ``instances``.
    """
    masks = LazyMaps.of(mask_logits).crop(image_size)
    if settings.proposals_on + settings.semantic_on + settings.panoptic_on + settings.instance_on > 1:
        masks = masks.cached()
    output: dict[str, Any] = {}
    if settings.proposals_on:
        output["proposal_masks"] = masks.apply(torch.sigmoid).compute()
    if settings.semantic_on:
        logits = masks.resize(output_size) if settings.resize_masks_first else masks
        output |= _semantic(scores[:, :-1], logits.apply(torch.sigmoid), settings, output_size, base)
    if settings.panoptic_on or settings.instance_on:
        masks = masks.resize(output_size)
        scores = scores / scores.sum(dim=1, keepdim=True).clamp(min=torch.finfo(scores.dtype).tiny)
    if settings.panoptic_on:
        output["panoptic_seg"] = panoptic_inference(
            scores,
            masks,
            things,
            object_mask_threshold=settings.object_mask_threshold,
            overlap_threshold=settings.overlap_threshold,
            pixel_threshold=settings.pixel_threshold,
        )
    if settings.instance_on:
        kept = things if settings.things_only or settings.panoptic_on else None
        output["instances"] = instance_inference(scores, masks, topk=settings.topk, things=kept)
    return output


def _semantic(
    scores: Tensor, masks: LazyMaps, settings: MergeSettings, size: tuple[int, int], base: Tensor | None
) -> dict[str, Tensor]:
    if settings.best_masks:
        best, threshold = best_masks(scores), settings.best_mask_threshold
        scores = scores[best]
        masks = masks[best].apply(lambda masks: (masks > threshold).to(scores.dtype))
    calibration: dict[str, Any] = {"base": base, "calibration": settings.calibration}
    classes = scores.shape[1]
    needed = classes * size[0] * size[1] * scores.element_size()
    limits = ((settings.max_dense_classes, classes), (settings.max_dense_bytes, needed))
    if any(0 < limit < value for limit, value in limits):
        return {"sem_seg_labels": semantic_labels(scores, masks, size, **calibration)[0]}
    return {"sem_seg": semantic_map(scores, masks, size, **calibration)}


def panoptic_inference(
    scores: Tensor,
    mask_logits: Tensor | LazyMaps,
    things: Collection[int],
    *,
    object_mask_threshold: float = 0.8,
    overlap_threshold: float = 0.8,
    pixel_threshold: float = 0.0,
) -> tuple[Tensor, list[dict[str, Any]]]:
    """Merge queries to segments without overlap (MaskFormer, Cheng et al., NeurIPS 2021, section 3.4).

    Each pixel goes to the query with the greatest product of class and mask probability, among the queries
    above `object_mask_threshold`. A query that wins too small a share of its mask is rejected, and its pixels
    become void.

    Args:
        scores: (Q, K + 1) class probabilities, "no object" last.
        mask_logits: (Q, H, W).
        things: Classes whose queries stay separate segments; segments of any other class are merged.
        object_mask_threshold: Class probability that a query must exceed.
        overlap_threshold: Least ratio of the pixels that a query wins to the pixels inside its mask
            (probability of at least 0.5).
        pixel_threshold: Least mask probability of a pixel, or it is void: 0 in MaskFormer, 0.5 in
            Mask2Former.

    Returns:
        Segment ids (H, W) int32, from 1 in the order of the queries, 0 for void; and the segments with
        ``id``, ``category_id`` and ``isthing``.
    """
    no_object = scores.shape[1] - 1
    top, labels = scores.max(dim=1)
    kept = ((labels != no_object) & (top > object_mask_threshold)).nonzero().squeeze(1)
    masks = LazyMaps.of(mask_logits)[kept].apply(torch.sigmoid)
    top, labels, size = top[kept], labels[kept], masks.shape[1:]
    if not len(labels):
        return torch.zeros(size, dtype=torch.int32, device=masks.device), []
    winner = torch.empty(size, dtype=torch.long, device=masks.device)
    confident = torch.empty(size, dtype=torch.bool, device=masks.device)
    inside = torch.zeros(len(labels), dtype=torch.long, device=masks.device)
    for band in masks.bands():
        probabilities = masks.rows(band.start, band.stop)
        winner[band] = (top[:, None, None] * probabilities).argmax(dim=0)
        confident[band] = probabilities.gather(0, winner[band][None])[0] >= pixel_threshold
        inside += (probabilities >= 0.5).sum(dim=(1, 2))
    pixels = winner.flatten()
    won = torch.zeros_like(inside).scatter_add_(0, pixels, torch.ones_like(pixels))
    owned = torch.zeros_like(inside).scatter_add_(0, pixels, confident.flatten().long())
    # one copy to the host for all that is decided there
    labels, won, owned, inside = torch.stack([labels, won, owned, inside]).cpu().unbind()
    ids, segments = _segments(labels, won, owned, inside, things, overlap_threshold)
    return ids.to(winner.device, non_blocking=True)[winner].mul_(confident), segments


def _segments(
    labels: Tensor, won: Tensor, owned: Tensor, inside: Tensor, things: Collection[int], overlap: float
) -> tuple[Tensor, list[dict[str, Any]]]:
    """Decide on the host which queries become segments, see `panoptic_inference`.

    Args:
        labels: class of each query (n,).
        won: number of pixels (n,) at which the query has the greatest product.
        owned: number of these (n,) whose mask probability suffices.
        inside: number of pixels (n,) inside the query's mask.
        things: classes whose queries stay separate.
        overlap: least ratio of `won` to `inside`.

    Returns:
        Segment id (n,) int32 of each query, 0 if it is rejected; and the segments.
    """
    accepted = (owned > 0) & (inside > 0) & (won.double() / inside >= overlap)
    # The first accepted query of a stuff class opens the segment that later queries of the class join.
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
    return ids, segments


def instance_inference(
    scores: Tensor,
    mask_logits: Tensor | LazyMaps,
    *,
    topk: int = 100,
    things: Collection[int] | None = None,
) -> Instances:
    """Select the best pairs of query and class as instances (Mask2Former, Cheng et al., CVPR 2022).

    Args:
        scores: (Q, K + 1) class probabilities, "no object" last.
        mask_logits: (Q, H, W).
        topk: Maximum number of pairs; a query may be several instances.
        things: Classes to keep; None: all.

    Returns:
        ``pred_masks`` (N, H, W) bool, ``pred_boxes`` around them, ``pred_classes``, and ``scores``: the class
        probability times the mean mask probability inside the mask.
    """
    probabilities = scores[:, :-1]
    top, index = probabilities.flatten().topk(min(topk, probabilities.numel()), sorted=False)
    query, label = index // probabilities.shape[1], index % probabilities.shape[1]
    if things is not None:
        kept = torch.isin(label, torch.tensor(sorted(things), dtype=label.dtype, device=label.device))
        top, query, label = top[kept], query[kept], label[kept]
    masks = LazyMaps.of(mask_logits)
    size = masks.shape[1:]
    instances = Instances(size)
    instances.pred_masks = torch.empty((len(query), *size), dtype=torch.bool, device=masks.device)
    boxes = torch.zeros((len(masks), 4), device=masks.device)
    certainty = torch.zeros(len(masks), dtype=scores.dtype, device=masks.device)
    for part in masks.parts(whole=0):
        logits = masks[part].compute()
        binary = logits > 0
        boxes[part] = tight_boxes(binary)
        certainty[part] = (logits.sigmoid() * binary).sum(dim=(1, 2)) / (binary.sum(dim=(1, 2)) + 1e-6)
        own = (query >= part.start) & (query < part.stop)
        instances.pred_masks[own] = binary[query[own] - part.start]
    instances.pred_boxes = Boxes(boxes[query])
    instances.scores = top * certainty[query]
    instances.pred_classes = label
    return instances
