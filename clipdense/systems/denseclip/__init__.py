"""DenseCLIP (Rao et al., CVPR 2022): segmentors and detectors on a language-guided backbone."""

from clipdense.systems.denseclip import convert as convert
from clipdense.systems.denseclip import convert_semantic as convert_semantic
from clipdense.systems.denseclip.config import add_denseclip_config
from clipdense.systems.denseclip.deeplab import DeepLabHead
from clipdense.systems.denseclip.heads import ScoreMapHead, SemanticFPNHead, UPerNetHead
from clipdense.systems.denseclip.loss import PixelTextLoss
from clipdense.systems.denseclip.meta_arch import DenseCLIPRCNN, DenseCLIPRetinaNet, PixelTextSupervised
from clipdense.systems.denseclip.retinanet import MMDetRetinaNet
from clipdense.systems.denseclip.semantic import (
    DenseCLIPSemanticSegmentor,
    ScoreMapSegmentor,
    WindowedSemanticSegmentor,
)

__all__ = [
    "DenseCLIPRCNN",
    "DenseCLIPRetinaNet",
    "DeepLabHead",
    "DenseCLIPSemanticSegmentor",
    "PixelTextLoss",
    "PixelTextSupervised",
    "MMDetRetinaNet",
    "ScoreMapHead",
    "ScoreMapSegmentor",
    "SemanticFPNHead",
    "UPerNetHead",
    "WindowedSemanticSegmentor",
    "add_denseclip_config",
]
