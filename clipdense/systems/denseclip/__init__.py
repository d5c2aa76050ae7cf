"""DenseCLIP (Rao et al., CVPR 2022): detectors and segmentors on a language-guided backbone."""

from clipdense.systems.denseclip.config import add_denseclip_config
from clipdense.systems.denseclip.loss import PixelTextLoss
from clipdense.systems.denseclip.meta_arch import DenseCLIPRCNN, DenseCLIPRetinaNet, PixelTextSupervised

__all__ = [
    "DenseCLIPRCNN",
    "DenseCLIPRetinaNet",
    "PixelTextLoss",
    "PixelTextSupervised",
    "add_denseclip_config",
]
