"""Mapper of semantic and panoptic segmentation."""

from __future__ import annotations

from typing import Any

from clipdense.data.mappers import MAPPER_REGISTRY, DetectionMapper, build_augmentations

from detectron2.config import CfgNode
from detectron2.data import transforms as T
from detectron2.projects.point_rend import ColorAugSSDTransform

__all__ = ["SegmentationMapper"]


@MAPPER_REGISTRY.register()
class SegmentationMapper(DetectionMapper):
    """`DetectionMapper` that in training crops after resizing and jitters colours (MaskFormer, Cheng et al.,
    NeurIPS 2021, appendix). In a crop no class covers more than ``INPUT.CROP.SINGLE_CATEGORY_MAX_AREA``."""

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict[str, Any]:
        """Read the constructor arguments from ``INPUT.*``."""
        arguments = super().from_config(cfg, is_train)
        if not is_train:
            return arguments
        crop = cfg.INPUT.CROP
        cfg = cfg.clone()
        cfg.defrost()
        cfg.INPUT.CROP.ENABLED = False
        resize, *flips = build_augmentations(cfg, is_train)
        augmentations = [resize]
        if crop.ENABLED:
            augmentations.append(
                T.RandomCrop_CategoryAreaConstraint(
                    crop.TYPE,
                    crop.SIZE,
                    crop.SINGLE_CATEGORY_MAX_AREA,
                    cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE,
                )
            )
        if cfg.INPUT.COLOR_AUG_SSD:
            augmentations.append(ColorAugSSDTransform(cfg.INPUT.FORMAT))
        return arguments | {"augmentations": [*augmentations, *flips]}
