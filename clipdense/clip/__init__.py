"""CLIP itself, over open_clip. Imports no detectron2 and works without it."""

from clipdense.clip.model import ClipModel, load_clip
from clipdense.clip.towers import TextTower, Tower, TowerOutput, TowerRequest

__all__ = ["ClipModel", "TextTower", "Tower", "TowerOutput", "TowerRequest", "load_clip"]
