"""From a dense map, boxes and masks to region embeddings, scores and detections. Imports no detectron2 and
works without it."""

from .classifier import TextClassifier
from .fusion import FUSIONS, FusionSettings, get_fusion
from .nms import class_nms
from .pooling import POOLINGS, Pooling, get_pooling, pool_boxes, pool_masks, resize_masks

__all__ = [
    "FUSIONS",
    "FusionSettings",
    "POOLINGS",
    "Pooling",
    "TextClassifier",
    "class_nms",
    "get_fusion",
    "get_pooling",
    "pool_boxes",
    "pool_masks",
    "resize_masks",
]
