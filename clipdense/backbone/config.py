"""Configuration keys of `clipdense.backbone`."""

from detectron2.config import CfgNode as CN


def add_backbone_config(cfg: CN) -> None:
    """Add the keys of `clipdense.backbone` to ``cfg`` (in place)."""
