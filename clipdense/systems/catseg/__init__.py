"""Open-vocabulary semantic segmentation by cost aggregation: CAT-Seg (Cho et al., CVPR 2024) and its
successor SED (Xie et al., CVPR 2024).
"""

from clipdense.systems.catseg import convert as convert
from clipdense.systems.catseg import sed_convert as sed_convert
from clipdense.systems.catseg.config import add_catseg_config
from clipdense.systems.catseg.cost import AggregationSettings, CostAggregator
from clipdense.systems.catseg.meta_arch import CATSeg
from clipdense.systems.catseg.sed import SED
from clipdense.systems.catseg.sed_decoder import SEDAggregator
from clipdense.systems.catseg.views import WindowSettings

__all__ = [
    "SED",
    "AggregationSettings",
    "CATSeg",
    "CostAggregator",
    "SEDAggregator",
    "WindowSettings",
    "add_catseg_config",
]
