"""CAT-Seg: open-vocabulary semantic segmentation by cost aggregation (Cho et al., CVPR 2024)."""

from clipdense.systems.catseg import convert as convert
from clipdense.systems.catseg.config import add_catseg_config
from clipdense.systems.catseg.cost import AggregationSettings, CostAggregator
from clipdense.systems.catseg.meta_arch import CATSeg
from clipdense.systems.catseg.views import WindowSettings

__all__ = [
    "AggregationSettings",
    "CATSeg",
    "CostAggregator",
    "WindowSettings",
    "add_catseg_config",
]
