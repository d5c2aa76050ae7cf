"""Training-free segmentation with any CLIP: MaskCLIP, SCLIP, ClearCLIP, NACLIP, ProxyCLIP and their line."""

from clipdense.systems.training_free.config import add_training_free_config
from clipdense.systems.training_free.encoder import Cosines, DenseEncoder, Memo, Refinements, WindowSettings
from clipdense.systems.training_free.features import FeatureModel
from clipdense.systems.training_free.meta_arch import ScoreSettings, ZeroShotSegmentor
from clipdense.systems.training_free.methods import METHODS, Method
from clipdense.systems.training_free.names import NAME_LISTS, name_list
from clipdense.systems.training_free.protocols import PROTOCOLS, protocol_overrides
from clipdense.systems.training_free.sam import SamModel

__all__ = [
    "METHODS",
    "NAME_LISTS",
    "PROTOCOLS",
    "Cosines",
    "DenseEncoder",
    "FeatureModel",
    "Memo",
    "Method",
    "Refinements",
    "SamModel",
    "ScoreSettings",
    "WindowSettings",
    "ZeroShotSegmentor",
    "add_training_free_config",
    "name_list",
    "protocol_overrides",
]
