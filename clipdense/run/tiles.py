"""Prediction on very large images by overlapping tiles."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torchvision.ops import batched_nms

from clipdense.inference import window_starts

from detectron2.structures import BitMasks, Boxes, Instances

__all__ = ["predict_tiles"]

_OVERLAP = 0.25
_SAME_OBJECT = 0.5  # overlap of two boxes, or share of the smaller one, above which they are one object


def predict_tiles(
    predict: Callable[[Any], Mapping[str, Any]], image: npt.NDArray[np.uint8], tile: int
) -> dict[str, Any]:
    """Predict on the tiles of an image, which overlap by a quarter, and merge their outputs.

    Class scores are averaged where tiles overlap. Of objects that two tiles see, the one with the higher
    score stays. An object that is larger than the overlap is reported in parts.

    Args:
        predict: from an image to Detectron2's output, in pixels of that image.
        image: (H, W, 3) uint8.
        tile: side of a tile in pixels.

    Returns:
        ``sem_seg`` or ``sem_seg_labels``, and ``instances``, as far as the model predicts them.

    Raises:
        ValueError: If the model predicts neither: the ids of a panoptic map cannot be merged.
    """
    height, width = image.shape[:2]
    step = max(1, round(tile * (1 - _OVERLAP)))
    starts = product(
        window_starts(height, min(tile, height), step), window_starts(width, min(tile, width), step)
    )
    semantic = _SemanticMerge((height, width))
    instances: list[Instances] = []
    for top, left in starts:
        output = predict(image[top : top + tile, left : left + tile])
        if "sem_seg" in output or "sem_seg_labels" in output:
            semantic.add(output, top, left)
        if "instances" in output:
            instances.append(_shifted(output["instances"].to("cpu"), top, left, (height, width)))
    merged = semantic.result()
    if instances:
        merged["instances"] = _without_repetitions(Instances.cat(instances))
    if not merged:
        raise ValueError(
            "panoptic segments cannot be merged across tiles: use tile=0, or another kind of output"
        )
    return merged


class _SemanticMerge:
    """Sums of class scores, or labels, of the tiles of an image."""

    def __init__(self, size: tuple[int, int]) -> None:
        self._size = size
        self._sum: Tensor | None = None
        self._count = torch.zeros(size)
        self._labels: Tensor | None = None
        self._border = torch.full(size, -1.0)

    def add(self, output: Mapping[str, Any], top: int, left: int) -> None:
        if "sem_seg" in output:
            scores = output["sem_seg"].detach().float().cpu()
            if self._sum is None:
                self._sum = torch.zeros(len(scores), *self._size)
            part = slice(top, top + scores.shape[1]), slice(left, left + scores.shape[2])
            self._sum[:, part[0], part[1]] += scores
            self._count[part] += 1
        if "sem_seg_labels" not in output:
            return
        labels = output["sem_seg_labels"].detach().cpu()
        if self._labels is None:
            self._labels = torch.full(self._size, -1, dtype=labels.dtype)
        height, width = labels.shape
        part = slice(top, top + height), slice(left, left + width)
        # of two tiles, the one in which a pixel is farther from the border
        rows, columns = torch.arange(height), torch.arange(width)
        away = torch.minimum(
            torch.minimum(rows, height - 1 - rows)[:, None], torch.minimum(columns, width - 1 - columns)[None]
        ).float()
        better = away > self._border[part]
        self._labels[part] = torch.where(better, labels, self._labels[part])
        self._border[part] = torch.where(better, away, self._border[part])

    def result(self) -> dict[str, Any]:
        if self._sum is not None:
            scores = self._sum / self._count.clamp(min=1)
            merged = {"sem_seg": scores}
            if self._labels is not None:  # of a model that leaves pixels without a class
                merged["sem_seg_labels"] = scores.argmax(0).where(self._labels >= 0, -1)
            return merged
        return {} if self._labels is None else {"sem_seg_labels": self._labels}


def _shifted(found: Instances, top: int, left: int, size: tuple[int, int]) -> Instances:
    """Return instances of a tile in pixels of the image."""
    fields: dict[str, Any] = {"scores": found.scores, "pred_classes": found.pred_classes}
    if found.has("pred_masks"):
        masks = found.pred_masks.tensor if isinstance(found.pred_masks, BitMasks) else found.pred_masks
        whole = torch.zeros(len(found), *size, dtype=torch.bool)
        whole[:, top : top + masks.shape[1], left : left + masks.shape[2]] = masks > 0
        fields["pred_masks"] = whole
    if found.has("pred_boxes"):
        fields["pred_boxes"] = Boxes(found.pred_boxes.tensor + torch.tensor([left, top, left, top]))
    else:
        fields["pred_boxes"] = BitMasks(fields["pred_masks"]).get_bounding_boxes()
    return Instances(size, **fields)


def _without_repetitions(found: Instances) -> Instances:
    """Keep the best of the boxes of one class that overlap, or of which one lies in the other."""
    boxes = found.pred_boxes.tensor.float()
    found = found[batched_nms(boxes, found.scores.float(), found.pred_classes, _SAME_OBJECT)]
    boxes, areas = found.pred_boxes.tensor, found.pred_boxes.area()
    corners = torch.maximum(boxes[:, None, :2], boxes[:, :2]), torch.minimum(boxes[:, None, 2:], boxes[:, 2:])
    common = (corners[1] - corners[0]).clamp(min=0).prod(-1)
    share = common / areas[:, None].clamp(min=1e-6)
    same = found.pred_classes[:, None] == found.pred_classes
    # inside of a larger box of the class
    inside = same & (share > 1 - _SAME_OBJECT / 2) & (areas[None] > areas[:, None])
    return found[~inside.any(1)]
