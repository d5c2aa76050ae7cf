"""Open-vocabulary detection on a frozen CLIP backbone: F-VLM (Kuo et al., ICLR 2023) and
F-ViT (Wu et al., CLIPSelf, ICLR 2024).
"""

from clipdense.systems.fvlm import convert as convert
from clipdense.systems.fvlm.config import add_fvlm_config
from clipdense.systems.fvlm.loss import open_vocabulary_loss
from clipdense.systems.fvlm.meta_arch import FVLM
from clipdense.systems.fvlm.roi_heads import FVLMBoxPredictor, FVLMROIHeads
from clipdense.systems.fvlm.rpn import NormRPNHead, ProbabilityRPN

__all__ = [
    "FVLM",
    "FVLMBoxPredictor",
    "FVLMROIHeads",
    "NormRPNHead",
    "ProbabilityRPN",
    "add_fvlm_config",
    "open_vocabulary_loss",
]
