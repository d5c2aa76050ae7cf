"""Mask proposals whose crops CLIP names: OVSeg (Liang et al., CVPR 2023), zsseg (Xu et al., ECCV 2022) and
ZegFormer (Ding et al., CVPR 2022).
"""

from clipdense.systems.two_stage.encoder import RegionEncoder, cosine_logits
from clipdense.systems.two_stage.scores import Scoring

__all__ = ["RegionEncoder", "Scoring", "cosine_logits"]
