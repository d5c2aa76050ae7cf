"""From a dense map, boxes and masks to region embeddings, scores and detections. Imports no detectron2 and
works without it."""

from .classifier import TextClassifier
from .crops import CROP_RULES, CropRule, MaskCrops, crop_masks, get_crop_rule, mask_boxes
from .fusion import FUSIONS, FusionSettings, calibrated_stacking, fuse_valid, get_fusion
from .nms import class_nms
from .pooling import POOLINGS, Pooling, get_pooling, pool_boxes, pool_masks, resize_masks
from .semantic import best_masks, semantic_labels, semantic_map

__all__ = [
    "CROP_RULES",
    "CropRule",
    "FUSIONS",
    "FusionSettings",
    "MaskCrops",
    "POOLINGS",
    "Pooling",
    "TextClassifier",
    "best_masks",
    "calibrated_stacking",
    "class_nms",
    "crop_masks",
    "fuse_valid",
    "get_crop_rule",
    "get_fusion",
    "get_pooling",
    "mask_boxes",
    "pool_boxes",
    "pool_masks",
    "resize_masks",
    "semantic_labels",
    "semantic_map",
]
