"""Adaptation of CLIP to masked crops (OVSeg, Liang et al., CVPR 2023, sections 3.2 and 3.3)."""

from clipdense.systems.mask_adaptation.config import add_adaptation_config
from clipdense.systems.mask_adaptation.mapper import MaskPairMapper
from clipdense.systems.mask_adaptation.meta_arch import MaskAdaptedCLIP

__all__ = ["MaskAdaptedCLIP", "MaskPairMapper", "add_adaptation_config"]
