"""Paths of configs and datasets."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["config_path", "datasets_root", "shipped_root"]

_PACKAGE = Path(__file__).parent


def shipped_root() -> Path:
    """Return the folder that holds ``configs`` and ``projects``, in a checkout and in an installed wheel."""
    return _PACKAGE if (_PACKAGE / "configs").is_dir() else _PACKAGE.parent


def config_path(name: str) -> str:
    """Return the path of a config that ships with clipdense, in a checkout and in an installed wheel.

    Args:
        name: path under ``configs/``, such as ``"shapes/mask_rcnn_clip_rn.yaml"``, or as in a checkout:
            ``"configs/shapes/mask_rcnn_clip_rn.yaml"``, ``"projects/FVLM/configs/fvit_b16_ovcoco.yaml"``.

    Raises:
        FileNotFoundError: If there is no such config; the message lists the configs of the same folder.
    """
    root = shipped_root()
    path = root / name if name.startswith(("configs/", "projects/")) else root / "configs" / name
    if not path.is_file():
        siblings = sorted((Path(name).parent / p.name).as_posix() for p in path.parent.glob("*.*"))
        known = ", ".join(siblings) if siblings else "that folder does not exist"
        raise FileNotFoundError(f"clipdense has no config {name!r}; there are: {known}")
    return str(path)


def datasets_root() -> Path:
    """Return the folder of datasets: ``$DETECTRON2_DATASETS``, by default ``datasets``."""
    return Path(os.environ.get("DETECTRON2_DATASETS", "datasets")).expanduser()
