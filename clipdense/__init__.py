"""CLIP per pixel and per region, for Detectron2.

Importing clipdense registers its backbones, meta-architectures, mappers, evaluators and datasets with
Detectron2 (`clipdense.registration` describes when each is imported). Without Detectron2, `clipdense.clip`,
`clipdense.regions`, `clipdense.checkpoint` and `clipdense.data.shapes` work as well.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from clipdense import registration
from clipdense.paths import config_path

if TYPE_CHECKING:
    from clipdense.run.predictor import Predictor as Predictor

    from detectron2.config import CfgNode

__version__ = "0.1.0"
__all__ = ["__version__", "add_clipdense_config", "config_path"]

registration.install()


def add_clipdense_config(cfg: CfgNode) -> None:
    """Add every clipdense key, with its default, to a Detectron2 config (in place)."""
    from clipdense.run.config import add_clipdense_config as add

    add(cfg)


def __getattr__(name: str) -> Any:
    if name == "Predictor":  # at its first use: it needs detectron2
        from clipdense.run.predictor import Predictor

        return Predictor
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
