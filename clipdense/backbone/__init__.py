"""Detectron2 backbones: CLIP towers and timm models as trunks, below an FPN or a simple feature pyramid."""

from clipdense.backbone.beside import BesideTrunk
from clipdense.backbone.clip_blocks import CLIPBlockTrunk
from clipdense.backbone.clip_trunk import CLIPTrunk
from clipdense.backbone.fpn import FPN, build_trunk_fpn_backbone
from clipdense.backbone.frozen_clip import FrozenCLIPTrunk, find_frozen_clip
from clipdense.backbone.interpolated import InterpolatedTrunk
from clipdense.backbone.language import LanguageTrunk
from clipdense.backbone.pooler import AnyStridePooler
from clipdense.backbone.simple_pyramid import SimpleFeaturePyramid, build_trunk_simple_pyramid_backbone
from clipdense.backbone.swin import SwinTrunk
from clipdense.backbone.timm_trunk import TimmTrunk
from clipdense.backbone.trunk import JOINT, SCORE, PixelConversion, Trunk
from clipdense.clip.context_decoder import ContextDecoder

from detectron2.projects import deeplab as deeplab  # registers build_resnet_deeplab_backbone

__all__ = [
    "JOINT",
    "SCORE",
    "AnyStridePooler",
    "BesideTrunk",
    "CLIPBlockTrunk",
    "CLIPTrunk",
    "ContextDecoder",
    "FPN",
    "FrozenCLIPTrunk",
    "InterpolatedTrunk",
    "LanguageTrunk",
    "PixelConversion",
    "SimpleFeaturePyramid",
    "SwinTrunk",
    "TimmTrunk",
    "Trunk",
    "build_trunk_fpn_backbone",
    "build_trunk_simple_pyramid_backbone",
    "find_frozen_clip",
]
