"""CLIP per pixel and per region, for Detectron2.

Importing clipdense registers its backbones, meta-architectures, mappers, evaluators and data sets with
Detectron2. Without Detectron2, `clipdense.clip`, `clipdense.regions`, `clipdense.checkpoint` and
`clipdense.data.shapes` work all the same.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipdense import compat

if TYPE_CHECKING:
    from clipdense.predictor import Predictor as Predictor

    from detectron2.config import CfgNode

__version__ = "0.1.0"
__all__ = ["__version__", "add_clipdense_config", "config_path"]

compat.apply()


def config_path(name: str) -> str:
    """Path of a config that ships with clipdense, in a checkout and in an installed wheel alike.

    Args:
        name: path under ``configs/``, e.g. ``"shapes/mask_rcnn_clip_rn.yaml"``.

    Raises:
        FileNotFoundError: no such config; names those of the same folder.
    """
    package = Path(__file__).parent
    root = package / "configs" if (package / "configs").is_dir() else package.parent / "configs"
    path = root / name
    if not path.is_file():
        siblings = sorted(p.relative_to(root).as_posix() for p in path.parent.glob("*.*"))
        known = ", ".join(siblings) if siblings else "that folder does not exist"
        raise FileNotFoundError(f"clipdense has no config {name!r}; beside it there are: {known}")
    return str(path)


def add_clipdense_config(cfg: CfgNode) -> None:
    """Add every clipdense key, with its default, to a Detectron2 config (in place)."""
    from clipdense.config import add_clipdense_config as add

    add(cfg)


def __getattr__(name: str) -> Any:
    if name == "Predictor":  # at its first use: it needs detectron2
        from clipdense.predictor import Predictor

        return Predictor
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


if compat.has_detectron2():
    from clipdense import backbone, data, engine, evaluation, maskformer, systems  # noqa: F401
