"""Configuration keys of `clipdense.engine`."""

from detectron2.config import CfgNode as CN


def add_engine_config(cfg: CN) -> None:
    """Add the keys of `clipdense.engine` to ``cfg`` (in place)."""
