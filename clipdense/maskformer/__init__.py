"""Mask proposals: the decoders, matching and losses of MaskFormer and Mask2Former, and the two as
closed-vocabulary models."""

from clipdense.maskformer import convert as convert
from clipdense.maskformer import mapper as mapper
from clipdense.maskformer.class_heads import ClassHead, EmbeddingHead, LinearClassHead
from clipdense.maskformer.config import add_maskformer_config
from clipdense.maskformer.criterion import SetCriterion
from clipdense.maskformer.deformable import MSDeformAttn, MSDeformAttnPixelDecoder, deformable_attention
from clipdense.maskformer.head import MaskFormerHead
from clipdense.maskformer.layers import MLP
from clipdense.maskformer.masked_decoder import MultiScaleMaskedTransformerDecoder
from clipdense.maskformer.matcher import HungarianMatcher
from clipdense.maskformer.meta_arch import MaskFormer
from clipdense.maskformer.open_vocabulary import OpenVocabularyMaskFormer
from clipdense.maskformer.pixel_decoder import BasePixelDecoder, TransformerEncoderPixelDecoder
from clipdense.maskformer.prediction import (
    PIXEL_DECODER_REGISTRY,
    TRANSFORMER_DECODER_REGISTRY,
    MaskPrediction,
    MaskProposals,
    PixelFeatures,
    Targets,
)
from clipdense.maskformer.transformer import StandardTransformerDecoder

__all__ = [
    "MLP",
    "PIXEL_DECODER_REGISTRY",
    "TRANSFORMER_DECODER_REGISTRY",
    "BasePixelDecoder",
    "ClassHead",
    "EmbeddingHead",
    "HungarianMatcher",
    "LinearClassHead",
    "MSDeformAttn",
    "MSDeformAttnPixelDecoder",
    "MaskFormer",
    "MaskFormerHead",
    "MaskPrediction",
    "MaskProposals",
    "MultiScaleMaskedTransformerDecoder",
    "OpenVocabularyMaskFormer",
    "PixelFeatures",
    "SetCriterion",
    "StandardTransformerDecoder",
    "Targets",
    "TransformerEncoderPixelDecoder",
    "add_maskformer_config",
    "deformable_attention",
]
