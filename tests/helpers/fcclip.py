"""FC-CLIP on the nano CLIPs, small enough to build and run in moments."""

from __future__ import annotations

from typing import Any

import torch

from clipdense.run.config import add_clipdense_config
from clipdense.systems.mask_pooling import FCCLIP

from detectron2.config import CfgNode, get_cfg
from detectron2.data import MetadataCatalog
from detectron2.modeling import build_model

__all__ = ["CLASSES", "build_fcclip", "fcclip_batch", "small_fcclip_config"]

CLASSES = ["red star", "blue star", "green ring", "grass"]
_NAME = "fcclip_test"


def small_fcclip_config(clip: str = "shapes-rn") -> CfgNode:
    """Return the config of an FC-CLIP with six queries on the frozen tower of a nano CLIP."""
    cfg = get_cfg()
    add_clipdense_config(cfg)
    cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.DEVICE, cfg.INPUT.FORMAT = "FCCLIP", "cpu", "RGB"
    cfg.MODEL.PIXEL_MEAN = cfg.MODEL.PIXEL_STD = [127.5] * 3
    cfg.MODEL.CLIP.NAME, cfg.MODEL.BACKBONE.NAME = clip, "FrozenCLIPTrunk"
    if clip != "shapes-rn":
        cfg.MODEL.BACKBONE.NAME, cfg.MODEL.FROZEN_CLIP.BLOCKS = "InterpolatedTrunk", [0, 1, 2, 3]
        cfg.MODEL.FROZEN_CLIP.LAST_BLOCK, cfg.MODEL.FROZEN_CLIP.JOINT = "value", "clipself"
        cfg.MODEL.INTERPOLATED.SCALE_FACTORS, cfg.MODEL.INTERPOLATED.NORM = [2.0, 1.0, 0.5, 0.25], "LN"
    keys = cfg.MODEL.MASK_FORMER
    keys.PIXEL_DECODER.NAME = "MSDeformAttnPixelDecoder"
    keys.TRANSFORMER_DECODER, keys.TRANSFORMER_IN_FEATURE = "MultiScaleMaskedTransformerDecoder", ""
    keys.PIXEL_DECODER.CONV_DIM = keys.MASK_DIM = keys.HIDDEN_DIM = 32
    keys.PIXEL_DECODER.ENC_LAYERS, keys.PIXEL_DECODER.DIM_FEEDFORWARD = 1, 32
    keys.NHEADS, keys.DIM_FEEDFORWARD, keys.NUM_OBJECT_QUERIES, keys.DEC_LAYERS = 4, 32, 6, 2
    keys.DROPOUT, keys.TRAIN_NUM_POINTS, keys.TARGETS = 0.0, 64, "semantic"
    keys.TEST.PANOPTIC_ON = keys.TEST.INSTANCE_ON = True
    keys.TEST.OBJECT_MASK_THRESHOLD, keys.TEST.PIXEL_THRESHOLD = 0.0, 0.5
    cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = len(CLASSES)
    cfg.MODEL.MASK_POOLING.TEMPLATES = "single"
    cfg.DATASETS.TRAIN = (_NAME,)
    return cfg


def build_fcclip(cfg: CfgNode) -> FCCLIP:
    """Build a model for `CLASSES`, with random weights except CLIP's."""
    MetadataCatalog.get(_NAME).set(stuff_classes=CLASSES)
    try:
        torch.manual_seed(0)
        model: FCCLIP = build_model(cfg)
    finally:
        MetadataCatalog.remove(_NAME)
    return model


def fcclip_batch() -> list[dict[str, Any]]:
    """Return two random images of different size with semantic maps and phrases."""
    generator = torch.Generator().manual_seed(0)
    samples: list[dict[str, Any]] = []
    for height, width in ((64, 96), (80, 72)):
        image = torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)
        labels = torch.arange(height)[:, None].mul(4).div(height).long().expand(height, width)
        samples.append(
            {
                "image": image,
                "sem_seg": labels,
                "phrases": ["red star", "grass"],
                "height": height + 10,
                "width": width - 5,
                "file_name": f"{height}.jpg",
                "image_id": height,
            }
        )
    return samples
