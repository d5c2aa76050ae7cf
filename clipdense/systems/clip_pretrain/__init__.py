"""Contrastive pre-training of a CLIP (Radford et al., 2021), with locked text if asked (LiT, Zhai et al.)."""

from clipdense.systems.clip_pretrain.config import add_clip_pretrain_config
from clipdense.systems.clip_pretrain.evaluator import CropRetrievalEvaluator
from clipdense.systems.clip_pretrain.mapper import CropCaptionMapper
from clipdense.systems.clip_pretrain.meta_arch import ContrastiveCLIP

__all__ = ["ContrastiveCLIP", "CropCaptionMapper", "CropRetrievalEvaluator", "add_clip_pretrain_config"]
