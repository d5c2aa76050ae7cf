"""CLIP models, built on open_clip. Works without detectron2.

The names below are imported at their first use, because open_clip takes seconds to import.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clipdense.clip.model import ClipModel, load_clip
    from clipdense.clip.towers import TextTower, Tower, TowerOutput, TowerRequest

__all__ = ["ClipModel", "TextTower", "Tower", "TowerOutput", "TowerRequest", "load_clip"]


def __getattr__(name: str) -> Any:
    if name in ("ClipModel", "load_clip"):
        return getattr(import_module("clipdense.clip.model"), name)
    if name in __all__:
        return getattr(import_module("clipdense.clip.towers"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
