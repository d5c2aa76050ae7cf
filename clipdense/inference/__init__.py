"""Pure functions from class scores and masks to semantic, panoptic and instance segmentation."""

from clipdense.inference.merging import (
    instance_inference,
    panoptic_inference,
    semantic_inference,
    tight_boxes,
)
from clipdense.inference.semantic import best_masks, semantic_labels, semantic_map

__all__ = [
    "best_masks",
    "instance_inference",
    "panoptic_inference",
    "semantic_inference",
    "semantic_labels",
    "semantic_map",
    "tight_boxes",
]
