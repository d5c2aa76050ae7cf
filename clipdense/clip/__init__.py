"""CLIP models, built on open_clip. Works without detectron2."""

from clipdense.clip.model import ClipModel, load_clip
from clipdense.clip.towers import TextTower, Tower, TowerOutput, TowerRequest

__all__ = ["ClipModel", "TextTower", "Tower", "TowerOutput", "TowerRequest", "load_clip"]
