"""Regions of images: weight-free pooling of dense maps, masked crops and their CLIP embeddings, tight boxes,
score fusion and suppression. Imports no detectron2 and works without it."""

from clipdense.clip.roi_align import roi_align
from clipdense.regions.boxes import MaskExtent, mask_extent, tight_boxes
from clipdense.regions.classifier import TextClassifier
from clipdense.regions.crops import CROP_RULES, CropRule, MaskCrops, crop_masks, get_crop_rule
from clipdense.regions.encoder import RegionEncoder, cosine_logits
from clipdense.regions.fusion import FUSIONS, FusionSettings, calibrated_stacking, fuse_valid, get_fusion
from clipdense.regions.lazy_maps import LazyMaps
from clipdense.regions.nms import class_nms
from clipdense.regions.pooling import POOLINGS, Pooling, get_pooling, pool_boxes, pool_masks, resize_masks

__all__ = [
    "CROP_RULES",
    "CropRule",
    "FUSIONS",
    "FusionSettings",
    "LazyMaps",
    "MaskCrops",
    "MaskExtent",
    "POOLINGS",
    "Pooling",
    "RegionEncoder",
    "TextClassifier",
    "calibrated_stacking",
    "class_nms",
    "cosine_logits",
    "crop_masks",
    "fuse_valid",
    "get_crop_rule",
    "get_fusion",
    "get_pooling",
    "mask_extent",
    "pool_boxes",
    "pool_masks",
    "resize_masks",
    "roi_align",
    "tight_boxes",
]
