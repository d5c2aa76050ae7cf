"""Detectron2 backbones: CLIP towers and timm models as trunks, with an FPN or a simple feature pyramid."""

from . import flops as flops
from .clip_trunk import CLIPTrunk
from .context_decoder import ContextDecoder
from .fpn import FPN, build_trunk_fpn_backbone
from .language import LanguageTrunk
from .simple_pyramid import SimpleFeaturePyramid, build_trunk_simple_pyramid_backbone
from .timm_trunk import TimmTrunk
from .trunk import SCORE, Trunk

__all__ = [
    "SCORE",
    "CLIPTrunk",
    "ContextDecoder",
    "FPN",
    "LanguageTrunk",
    "SimpleFeaturePyramid",
    "TimmTrunk",
    "Trunk",
    "build_trunk_fpn_backbone",
    "build_trunk_simple_pyramid_backbone",
]
