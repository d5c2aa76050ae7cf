"""Two-stage open-vocabulary segmentation, mask proposals classified by CLIP: OVSeg (Liang et al., CVPR 2023),
zsseg (Xu et al., ECCV 2022) and ZegFormer (Ding et al., CVPR 2022).
"""

from clipdense.systems.two_stage import convert as convert
from clipdense.systems.two_stage.config import add_two_stage_config
from clipdense.systems.two_stage.meta_arch import OVSeg
from clipdense.systems.two_stage.queries import QueryClassifier
from clipdense.systems.two_stage.scores import Scoring

__all__ = [
    "OVSeg",
    "QueryClassifier",
    "Scoring",
    "add_two_stage_config",
]
