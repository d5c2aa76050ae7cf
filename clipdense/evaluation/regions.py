"""Which segments of an image CLIPSelf's evaluation measures, and their crops."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from clipdense.data.letterbox import crop_box, enlarge_box

__all__ = ["CROP_SCALE", "MAX_AREA", "MAX_SEGMENTS", "MIN_AREA", "Regions", "crop_regions", "find_regions"]

MAX_SEGMENTS = 100
"""Number of segments of an image that are measured: the first ones."""
MIN_AREA, MAX_AREA = 8**2, 1024**2
"""Range of the box area of a segment in square pixels, both ends included."""
CROP_SCALE = 1.5
"""Factor by which the box of a thing is enlarged for its crop; boxes of stuff stay as they are."""


@dataclass(frozen=True)
class Regions:
    """The measured segments of one image.

    Attributes:
        image: (H, W, 3) uint8 RGB.
        labels: (n,) int64, classes.
        things: (n,) bool, True for things.
        boxes: (n, 4) float32, xyxy in pixels: the annotated box of a thing, the extreme pixels of the mask of
            stuff.
        masks: (n, H, W) bool.
    """

    image: npt.NDArray[np.uint8]
    labels: Tensor
    things: Tensor
    boxes: Tensor
    masks: Tensor


def find_regions(
    image: npt.NDArray[np.uint8],
    ids: npt.NDArray[np.int64],
    segments: Sequence[Mapping[str, Any]],
    classes: Mapping[Any, tuple[int, bool]],
) -> Regions | None:
    """Select the segments of an image that are measured; None if there are none.

    Args:
        image: (H, W, 3) uint8 RGB.
        ids: (H, W) segment ids.
        segments: COCO panoptic ``segments_info``: ``id``, ``category_id`` and ``bbox`` (x, y, w, h;
            default: of the mask).
        classes: category id -> (label, whether the class is a thing).
    """
    labels, things, boxes, masks = [], [], [], []
    for segment in segments[:MAX_SEGMENTS]:
        label, is_thing = classes[segment["category_id"]]
        mask = ids == segment["id"]
        if is_thing and "bbox" in segment:
            x, y, w, h = segment["bbox"]
            box = (x, y, x + w, y + h)
        elif mask.any():
            (rows,), (columns,) = mask.any(1).nonzero(), mask.any(0).nonzero()
            box = (columns[0], rows[0], columns[-1], rows[-1])  # as published, without + 1
            if is_thing:  # its file has no box: it is that of the mask, as COCO states boxes
                box = (box[0], box[1], box[2] + 1, box[3] + 1)
        else:
            continue
        if MIN_AREA <= (box[2] - box[0]) * (box[3] - box[1]) <= MAX_AREA:
            labels.append(label)
            things.append(is_thing)
            boxes.append([float(coordinate) for coordinate in box])
            masks.append(mask)
    if not labels:
        return None
    return Regions(
        image,
        torch.tensor(labels),
        torch.tensor(things),
        torch.tensor(boxes),
        torch.from_numpy(np.stack(masks)),
    )


def crop_regions(regions: Regions, size: int) -> npt.NDArray[np.uint8]:
    """Cut the crops of regions and letterbox them: (n, size, size, 3) uint8 RGB."""
    image_size = regions.image.shape[:2]
    crops = []
    for box, is_thing in zip(regions.boxes.tolist(), regions.things.tolist(), strict=True):
        scale = CROP_SCALE if is_thing else 1.0
        crops.append(crop_box(regions.image, enlarge_box(box, scale, image_size), size))
    return np.stack(crops)
