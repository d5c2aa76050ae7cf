"""Open-vocabulary panoptic segmentation with mask pooling: FC-CLIP (Yu et al., NeurIPS 2023) and the heads of
ODISE (Xu et al., CVPR 2023), on any CLIP backbone.
"""

from clipdense.systems.mask_pooling import convert as convert
from clipdense.systems.mask_pooling import mapper as mapper
from clipdense.systems.mask_pooling.config import add_mask_pooling_config
from clipdense.systems.mask_pooling.ensemble import Ensemble
from clipdense.systems.mask_pooling.grounding import GroundingLoss, grounding_loss
from clipdense.systems.mask_pooling.meta_arch import FCCLIP, ClassLogits
from clipdense.systems.mask_pooling.pooling import MaskPolicy, region_masks
from clipdense.systems.mask_pooling.queries import PooledQueryHead, SynonymClassifier
from clipdense.systems.mask_pooling.region_heads import embed_dense_regions, embed_token_regions

__all__ = [
    "FCCLIP",
    "ClassLogits",
    "Ensemble",
    "GroundingLoss",
    "MaskPolicy",
    "PooledQueryHead",
    "SynonymClassifier",
    "add_mask_pooling_config",
    "embed_dense_regions",
    "embed_token_regions",
    "grounding_loss",
    "region_masks",
]
