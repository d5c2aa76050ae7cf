"""Assembly of the configuration keys: the shared ones here, those of each room in its ``config.py``."""

import os

import torch

from clipdense.backbone.config import add_backbone_config
from clipdense.data.config import add_data_config
from clipdense.data.shapes.pretraining import add_shapes_pretraining_config
from clipdense.engine.config import add_engine_config
from clipdense.evaluation.config import add_evaluation_config
from clipdense.maskformer.config import add_maskformer_config
from clipdense.systems import add_systems_config

from detectron2.config import CfgNode as CN

__all__ = ["add_clipdense_config"]


def add_clipdense_config(cfg: CN) -> None:
    """Add every clipdense key with its default to a Detectron2 config (in place).

    Call it once, after ``detectron2.config.get_cfg()`` and after the ``add_..._config`` functions of other
    projects. Values that these have set stay (e.g. SOLVER.OPTIMIZER of Panoptic-DeepLab). A config that
    already has the clipdense keys is not changed. MODEL.DEVICE is "cpu" unless there is a GPU, or the
    environment variable CLIPDENSE_DEVICE if that is set.

    Args:
        cfg: the root of the config.
    """
    if "CLIP" in cfg.MODEL:
        return
    before = cfg.clone()
    _add_clip_keys(cfg)
    add_data_config(cfg)
    add_shapes_pretraining_config(cfg)
    add_backbone_config(cfg)
    add_engine_config(cfg)
    add_evaluation_config(cfg)
    add_maskformer_config(cfg)
    add_systems_config(cfg)
    _restore(cfg, before)
    if cfg.MODEL.DEVICE == "cuda":  # Detectron2's default
        default = "cuda" if torch.cuda.is_available() else "cpu"
        cfg.MODEL.DEVICE = os.environ.get("CLIPDENSE_DEVICE") or default


def _add_clip_keys(cfg: CN) -> None:
    """Add the keys that describe the CLIP model."""
    # Allow pickled weight files, for every part of the model. Opening a pickle can run code: set it only for
    # files from a source that you trust.
    cfg.MODEL.ALLOW_PICKLE = False
    # Whether weights with which a backbone starts are downloaded. The tools build a backbone without them if
    # it is wholly in the checkpoint that is loaded afterwards.
    cfg.MODEL.FETCH_WEIGHTS = True
    cfg.register_renamed_key("MODEL.CLIP.ALLOW_PICKLE", "MODEL.ALLOW_PICKLE")
    cfg.register_renamed_key("MODEL.TIMM.ALLOW_PICKLE", "MODEL.ALLOW_PICKLE")

    cfg.MODEL.CLIP = CN()
    # Model name: any open_clip model, or a CLIP of this package ("shapes-rn", "shapes-vit", ...).
    cfg.MODEL.CLIP.NAME = "shapes-rn"
    # Weights of the model: an open_clip tag, a hub id, a local file or "random"; "" uses the weights shipped
    # with the package.
    cfg.MODEL.CLIP.PRETRAINED = ""
    # Resizing of the position table to another grid: "bicubic", "bilinear", or "crop" (the top-left window,
    # as published DenseCLIP detectors need).
    cfg.MODEL.CLIP.POSITION_RULE = "bicubic"
    # Side of the grid to which the position table is resized (bilinearly) when the model is built, in cells;
    # 0 keeps the pretrained grid.
    cfg.MODEL.CLIP.POSITION_GRID = 0
    # ViTs: distance of neighbouring patches in pixels, 1 to the patch size; 0: the patch size. A smaller
    # one lets patches overlap: half of it gives a map of twice the height and width.
    cfg.MODEL.CLIP.PATCH_STRIDE = 0
    # ViTs: add the class embedding twice, as the published segmentors of DenseCLIP do. False is CLIP.
    cfg.MODEL.CLIP.DOUBLE_CLASS_EMBEDDING = False
    # ViTs: rate of stochastic depth in the last block of the image tower; it rises linearly from 0 in the
    # first one. In 0..1; used in training only (published DenseCLIP segmentors: 0.1).
    cfg.MODEL.CLIP.DROP_PATH = 0.0
    # Custom open_clip model_cfg (embed_dim, vision_cfg, text_cfg, quick_gelu); overrides the one of NAME.
    cfg.MODEL.CLIP.CONFIG = CN(new_allowed=True)


def _restore(cfg: CN, before: CN) -> None:
    """Set every key of ``before`` in ``cfg`` to its value in ``before``."""
    for key, value in before.items():
        if isinstance(value, CN) and isinstance(cfg.get(key), CN):
            _restore(cfg[key], value)
        else:
            cfg[key] = value
