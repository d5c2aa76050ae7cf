"""Detectron2 backbones: CLIP towers and timm models as trunks, with an FPN or a simple feature pyramid."""

from detectron2.projects import deeplab as deeplab  # registers build_resnet_deeplab_backbone

from . import flops as flops
from .clip_trunk import CLIPTrunk
from .context_decoder import ContextDecoder
from .fpn import FPN, build_trunk_fpn_backbone
from .frozen_clip import FrozenCLIPTrunk
from .interpolated import InterpolatedTrunk
from .language import LanguageTrunk
from .pooler import AnyStridePooler
from .simple_pyramid import SimpleFeaturePyramid, build_trunk_simple_pyramid_backbone
from .swin import SwinTrunk
from .timm_trunk import TimmTrunk
from .trunk import JOINT, SCORE, Trunk

__all__ = [
    "JOINT",
    "SCORE",
    "AnyStridePooler",
    "CLIPTrunk",
    "ContextDecoder",
    "FPN",
    "FrozenCLIPTrunk",
    "InterpolatedTrunk",
    "LanguageTrunk",
    "SimpleFeaturePyramid",
    "SwinTrunk",
    "TimmTrunk",
    "Trunk",
    "build_trunk_fpn_backbone",
    "build_trunk_simple_pyramid_backbone",
]
