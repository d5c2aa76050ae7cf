"""Detectron2's standard ROI heads with a text classifier."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from clipdense.systems.text_rcnn.predictor import TextBoxPredictor

from detectron2.config import CfgNode as CN
from detectron2.layers import ShapeSpec
from detectron2.modeling.roi_heads import ROI_HEADS_REGISTRY, StandardROIHeads


@ROI_HEADS_REGISTRY.register()
class TextROIHeads(StandardROIHeads):
    """`StandardROIHeads` with a `TextBoxPredictor` as box predictor."""

    @classmethod
    def _init_box_head(cls, cfg: CN, input_shape: Mapping[str, ShapeSpec]) -> dict[str, Any]:
        heads = super()._init_box_head(cfg, input_shape)
        return heads | {"box_predictor": TextBoxPredictor(cfg, heads["box_head"].output_shape)}
