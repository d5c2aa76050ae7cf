"""Training-free segmentation with any CLIP: MaskCLIP, SCLIP, ClearCLIP, NACLIP, ProxyCLIP and their line."""

from clipdense.systems.training_free.config import add_training_free_config
from clipdense.systems.training_free.encoder import Cosines, DenseEncoder, Memo, WindowSettings
from clipdense.systems.training_free.features import FeatureModel
from clipdense.systems.training_free.meta_arch import ScoreSettings, ZeroShotSegmentor
from clipdense.systems.training_free.methods import METHODS, Method
from clipdense.systems.training_free.names import NAME_LISTS, name_list
from clipdense.systems.training_free.protocols import PROTOCOLS, protocol_overrides
from clipdense.systems.training_free.sam import SamModel
from clipdense.systems.training_free.sweep import Sweep, Variant, load_sweep

__all__ = [
    "METHODS",
    "NAME_LISTS",
    "PROTOCOLS",
    "Cosines",
    "DenseEncoder",
    "FeatureModel",
    "Memo",
    "Method",
    "SamModel",
    "ScoreSettings",
    "Sweep",
    "Variant",
    "WindowSettings",
    "ZeroShotSegmentor",
    "add_training_free_config",
    "load_sweep",
    "name_list",
    "protocol_overrides",
]
