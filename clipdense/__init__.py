"""CLIP per pixel and per region, for Detectron2.

Importing clipdense registers its backbones, meta-architectures, mappers, evaluators and datasets with
Detectron2 (`clipdense.registration` describes when each is imported). Without Detectron2, `clipdense.clip`,
`clipdense.regions`, `clipdense.checkpoint` and `clipdense.data.shapes` work as well.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from clipdense import registration
from clipdense.paths import config_path

if TYPE_CHECKING:
    from clipdense.run.api import detect as detect
    from clipdense.run.api import panoptic as panoptic
    from clipdense.run.api import segment as segment
    from clipdense.run.prediction import Prediction as Prediction
    from clipdense.run.predictor import Predictor as Predictor

    from detectron2.config import CfgNode

__version__ = "0.1.0"
__all__ = ["__version__", "add_clipdense_config", "config_path"]

registration.install()


def add_clipdense_config(cfg: CfgNode) -> None:
    """Add every clipdense key, with its default, to a Detectron2 config (in place)."""
    from clipdense.run.config import add_clipdense_config as add

    add(cfg)


# Imported at their first use, as they need torch and detectron2.
_LAZY = {
    "Prediction": "clipdense.run.prediction",
    "Predictor": "clipdense.run.predictor",
    "detect": "clipdense.run.api",
    "panoptic": "clipdense.run.api",
    "segment": "clipdense.run.api",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(_LAZY[name]), name)
    except ModuleNotFoundError as error:
        if error.name != "detectron2":
            raise
        raise ImportError(
            f"clipdense.{name} needs detectron2: pip install --no-build-isolation pb1-detectron2 (its Python "
            "part), or git+https://github.com/facebookresearch/detectron2. clipdense.clip and "
            "clipdense.regions work without it"
        ) from error
