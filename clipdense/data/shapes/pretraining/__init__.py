"""Contrastive pre-training of a CLIP (Radford et al., 2021).

The text tower can be locked (LiT, Zhai et al., 2022).
"""

from clipdense.data.shapes.pretraining.config import add_shapes_pretraining_config
from clipdense.data.shapes.pretraining.evaluator import CropRetrievalEvaluator
from clipdense.data.shapes.pretraining.mapper import CropCaptionMapper, CropPairMapper
from clipdense.data.shapes.pretraining.meta_arch import ContrastiveCLIP

__all__ = [
    "ContrastiveCLIP",
    "CropCaptionMapper",
    "CropPairMapper",
    "CropRetrievalEvaluator",
    "add_shapes_pretraining_config",
]
