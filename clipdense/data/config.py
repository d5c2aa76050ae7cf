"""Configuration keys of `clipdense.data`."""

from detectron2.config import CfgNode as CN


def add_data_config(cfg: CN) -> None:
    """Add the keys of `clipdense.data` to ``cfg`` (in place)."""
