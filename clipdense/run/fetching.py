"""Whether the initial weights of a run are needed, or all replaced by a checkpoint."""

from __future__ import annotations

import logging
from contextlib import suppress
from pathlib import Path

import torch

from clipdense.backbone.timm_weights import is_local
from clipdense.checkpoint import Checkpoint, read_checkpoint
from clipdense.clip.sources import without_weights

from detectron2.config import CfgNode
from detectron2.modeling import build_backbone

__all__ = ["backbone_is_in", "checkpoint_to_resume", "downloads_weights"]

logger = logging.getLogger(__name__)


def checkpoint_to_resume(output_dir: str) -> Path | None:
    """Return the checkpoint from which ``--resume`` continues; None if there is none."""
    with suppress(OSError, UnicodeDecodeError, ValueError):
        path = Path(output_dir, Path(output_dir, "last_checkpoint").read_text().strip())
        return path if path.is_file() else None
    return None


def downloads_weights(cfg: CfgNode) -> bool:
    """Return whether the backbone of a config starts with weights that have to be downloaded."""
    clip, timm = cfg.MODEL.CLIP, cfg.MODEL.TIMM
    names = {cfg.MODEL.BACKBONE.NAME, cfg.MODEL.TRUNK.NAME, cfg.MODEL.LANGUAGE.TRUNK}
    if "BesideTrunk" in names:
        names.add(cfg.MODEL.LANGUAGE.BESIDE)
    of_clip = not clip.CONFIG and without_weights(clip.NAME, clip.PRETRAINED) != clip.PRETRAINED
    of_timm = bool(names & {"TimmTrunk", "SwinTrunk"}) and not is_local(timm.PRETRAINED)
    return of_clip or of_timm


def backbone_is_in(cfg: CfgNode, checkpoint: Checkpoint | Path) -> bool:
    """Return whether a checkpoint holds every parameter of the backbone of a config.

    Args:
        cfg: whose datasets are registered.
        checkpoint: the file, or its path.
    """
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.FETCH_WEIGHTS, cfg.MODEL.DEVICE = False, "meta"
    try:
        if isinstance(checkpoint, Path):
            checkpoint = read_checkpoint(checkpoint, allow_pickle=cfg.MODEL.ALLOW_PICKLE, lazy=True)
        with torch.device("meta"):
            keys = build_backbone(cfg).state_dict().keys()
    except Exception as error:  # building the model describes what is wrong
        logger.debug("The backbone cannot be compared with the checkpoint: %s", error)
        return False
    ends = {key.partition("backbone.")[2] for key in checkpoint.state}
    return bool(keys) and set(keys) <= ends
