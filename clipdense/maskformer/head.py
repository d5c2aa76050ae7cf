"""Pixel decoder and transformer decoder as one head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from clipdense.maskformer.class_heads import LinearClassHead
from clipdense.maskformer.prediction import (
    PIXEL_DECODER_REGISTRY,
    TRANSFORMER_DECODER_REGISTRY,
    MaskPrediction,
)

from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec

__all__ = ["MaskFormerHead"]


class MaskFormerHead(nn.Module):
    """From a backbone's maps to a set of masks with classes.

    Attributes:
        pixel_decoder: one of `PIXEL_DECODER_REGISTRY`.
        predictor: one of `TRANSFORMER_DECODER_REGISTRY`.
    """

    @configurable
    def __init__(self, pixel_decoder: nn.Module, predictor: nn.Module, in_feature: str = "") -> None:
        """
        Args:
            in_feature: the backbone's map that queries look at; "" for the pixel decoder's own.
        """
        super().__init__()
        self.pixel_decoder = pixel_decoder
        self.predictor = predictor
        self.in_feature = in_feature

    @classmethod
    def from_config(
        cls, cfg: CfgNode, input_shape: Mapping[str, ShapeSpec], class_embed: nn.Module | None = None
    ) -> dict[str, Any]:
        """Constructor arguments from ``MODEL.MASK_FORMER``.

        Args:
            input_shape: all maps of the backbone.
            class_embed: the class head; None for a linear layer to ``MODEL.SEM_SEG_HEAD.NUM_CLASSES`` and
                "no object".

        Raises:
            ValueError: maps that the backbone or the pixel decoder does not give.
        """
        keys = cfg.MODEL.MASK_FORMER
        in_feature: str = keys.TRANSFORMER_IN_FEATURE
        if missing := {*keys.IN_FEATURES, *filter(None, [in_feature])} - set(input_shape):
            raise ValueError(
                f"the backbone gives {list(input_shape)}; MODEL.MASK_FORMER.IN_FEATURES and "
                f"TRANSFORMER_IN_FEATURE ask for {sorted(missing)}"
            )
        shapes = {name: input_shape[name] for name in keys.IN_FEATURES}
        pixel_decoder = PIXEL_DECODER_REGISTRY.get(keys.PIXEL_DECODER.NAME)(cfg, shapes)
        decoder = TRANSFORMER_DECODER_REGISTRY.get(keys.TRANSFORMER_DECODER)
        channels = [input_shape[in_feature].channels] if in_feature else pixel_decoder.level_channels
        if len(channels) != decoder.num_levels:
            raise ValueError(
                f"{keys.TRANSFORMER_DECODER} looks at {decoder.num_levels} maps, but MODEL.MASK_FORMER."
                f"TRANSFORMER_IN_FEATURE {in_feature!r} and {keys.PIXEL_DECODER.NAME} give {len(channels)}"
            )
        if class_embed is None:
            class_embed = LinearClassHead(keys.HIDDEN_DIM, cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES)
        return {
            "pixel_decoder": pixel_decoder,
            "predictor": decoder(cfg, channels[0], class_embed),
            "in_feature": in_feature,
        }

    def forward(self, features: Mapping[str, Tensor]) -> MaskPrediction:
        """The backbone's maps (B, C, h, w) by name -> masks with classes."""
        mask_features, levels = self.pixel_decoder(features)
        return self.predictor([features[self.in_feature]] if self.in_feature else levels, mask_features)
