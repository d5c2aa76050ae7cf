"""Configuration keys of `clipdense.evaluation`."""

from detectron2.config import CfgNode as CN


def add_evaluation_config(cfg: CN) -> None:
    """Add the keys of `clipdense.evaluation` to ``cfg`` (in place)."""
