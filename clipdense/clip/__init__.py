"""CLIP itself, over open_clip. Imports no detectron2 and works without it."""

from .model import ClipModel, load_clip

__all__ = ["ClipModel", "load_clip"]
