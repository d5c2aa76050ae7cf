"""SegCLIP (Luo et al., ICML 2023): open-vocabulary segmentation from image-text pairs."""

from clipdense.systems.segclip import convert as convert  # registers the layout of the published file
from clipdense.systems.segclip.config import add_segclip_config
from clipdense.systems.segclip.mapper import SegCLIPMapper
from clipdense.systems.segclip.meta_arch import SegCLIP

__all__ = ["SegCLIP", "SegCLIPMapper", "add_segclip_config"]
