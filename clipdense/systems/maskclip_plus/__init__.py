"""MaskCLIP+: a segmentor that learns from the labels of a frozen MaskCLIP."""

from clipdense.systems.maskclip_plus.config import add_maskclip_plus_config
from clipdense.systems.maskclip_plus.heads import DeepLabV2TextHead, DeepLabV3PlusTextHead, TextClassifier
from clipdense.systems.maskclip_plus.labels import (
    UNLABELLED,
    fill_labels,
    hardest_pixels,
    pseudo_labels,
    suppress_labels,
)
from clipdense.systems.maskclip_plus.meta_arch import LabelRules, MaskCLIPPlus

__all__ = [
    "UNLABELLED",
    "DeepLabV2TextHead",
    "DeepLabV3PlusTextHead",
    "LabelRules",
    "MaskCLIPPlus",
    "TextClassifier",
    "add_maskclip_plus_config",
    "fill_labels",
    "hardest_pixels",
    "pseudo_labels",
    "suppress_labels",
]
