"""DenseCLIP (Rao et al., CVPR 2022): detectors on a language-guided backbone."""

from clipdense.systems.denseclip import convert as convert
from clipdense.systems.denseclip.config import add_denseclip_config
from clipdense.systems.denseclip.loss import PixelTextLoss
from clipdense.systems.denseclip.meta_arch import DenseCLIPRCNN, DenseCLIPRetinaNet, PixelTextSupervised
from clipdense.systems.denseclip.retinanet import MMDetRetinaNet

__all__ = [
    "DenseCLIPRCNN",
    "DenseCLIPRetinaNet",
    "PixelTextLoss",
    "PixelTextSupervised",
    "MMDetRetinaNet",
    "add_denseclip_config",
]
