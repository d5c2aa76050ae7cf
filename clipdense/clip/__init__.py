"""CLIP itself, over open_clip. Imports no detectron2 and works without it."""

from .model import ClipModel, load_clip
from .towers import TextTower, Tower, TowerOutput, Want

__all__ = ["ClipModel", "TextTower", "Tower", "TowerOutput", "Want", "load_clip"]
