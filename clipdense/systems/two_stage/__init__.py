"""Mask proposals whose crops CLIP names: OVSeg (Liang et al., CVPR 2023), zsseg (Xu et al., ECCV 2022) and
ZegFormer (Ding et al., CVPR 2022).
"""

from clipdense.systems.two_stage import convert as convert
from clipdense.systems.two_stage.adaptation import MaskAdaptedCLIP
from clipdense.systems.two_stage.adaptation_config import add_adaptation_config
from clipdense.systems.two_stage.adaptation_mapper import MaskPairMapper
from clipdense.systems.two_stage.config import add_two_stage_config
from clipdense.systems.two_stage.encoder import RegionEncoder, cosine_logits
from clipdense.systems.two_stage.meta_arch import OVSeg
from clipdense.systems.two_stage.queries import QueryClassifier
from clipdense.systems.two_stage.scores import Scoring

__all__ = [
    "MaskAdaptedCLIP",
    "MaskPairMapper",
    "OVSeg",
    "QueryClassifier",
    "RegionEncoder",
    "Scoring",
    "add_adaptation_config",
    "add_two_stage_config",
    "cosine_logits",
]
