"""A segmentor of any words from a CLIP alone: the config of a training-free method."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

from clipdense.clip.nano import NANO_MODELS
from clipdense.clip.vocabulary import Vocabulary, canonical
from clipdense.data.shapes.world import GROUNDS
from clipdense.run.config import add_clipdense_config
from clipdense.run.words import VocabularyLike

from detectron2.config import CfgNode, get_cfg

__all__ = ["BACKGROUND", "NANO", "default_background", "zero_shot_config"]

NANO = "shapes-rn"
"""CLIP that ships with the package, and of those the best at patches (projects/ZeroShot)."""

BACKGROUND = (
    "sky|wall|tree|wood|grass|road|sea|river|mountain|sands|desk|building|cloud|lamp|door|window|wardrobe|"
    "ceiling|shelf|curtain|stair|floor|hill|rail|fence"
)
"""Names of what surrounds things in photographs, one class (SCLIP, Wang et al., ECCV 2024, for VOC21)."""


def default_background(model: str, words: VocabularyLike | None = None) -> str | None:
    """Return the background words for a CLIP: those of photographs, or the grounds of the shapes world.

    Args:
        model: name of the CLIP.
        words: classes to predict, whose names are left out.
    """
    wanted = set() if words is None else {canonical(n) for c in Vocabulary.parse(words).synonyms for n in c}
    names, separator = (GROUNDS, ", ") if model in NANO_MODELS else (BACKGROUND.split("|"), "|")
    return separator.join(name for name in names if canonical(name) not in wanted) or None


def zero_shot_config(
    model: str = NANO,
    pretrained: str = "",
    method: str = "",
    device: str = "",
    opts: Iterable[Any] = (),
) -> CfgNode:
    """Return the config of a `ZeroShotSegmentor` for any CLIP.

    Args:
        model: open_clip model name, a nano CLIP, a hub id or a weight file, see `load_clip`.
        pretrained: tag or weight file, see `load_clip`.
        method: training-free method (``MODEL.ZERO_SHOT.METHOD``); default: "maskclip" for ResNets and
            ConvNeXts, "sclip" for ViTs.
        device: "cpu", "cuda" ...; default: a GPU if there is one.
        opts: further overrides, KEY VALUE in turn.
    """
    cfg = get_cfg()
    add_clipdense_config(cfg)
    cfg.MODEL.META_ARCHITECTURE = "ZeroShotSegmentor"
    cfg.MODEL.CLIP.NAME = model
    cfg.MODEL.CLIP.PRETRAINED = pretrained
    cfg.MODEL.ZERO_SHOT.METHOD = method or default_method(model)
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ()
    cfg.INPUT.FORMAT = "RGB"
    if model in NANO_MODELS:  # as configs/shapes/Base-ZeroShot.yaml
        cfg.MODEL.ZERO_SHOT.WINDOW, cfg.MODEL.ZERO_SHOT.STRIDE = 128, 64
        cfg.MODEL.ZERO_SHOT.TEMPLATES = "single"
        cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = 256, 1024
    else:  # as projects/ZeroShot/configs/Base-ZeroShot.yaml
        cfg.MODEL.CLIP.POSITION_RULE = "dino_scale"
        cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = 336, 2048
    if device:
        cfg.MODEL.DEVICE = device
    cfg.merge_from_list(list(opts))
    return cfg


def default_method(model: str) -> str:
    """Return the training-free method for a CLIP by its name."""
    name = os.path.basename(model).lower()
    convolutional = name == "shapes-rn" or name.startswith(("rn", "convnext", "timm-resnet"))
    return "maskclip" if convolutional else "sclip"
