"""Head of mask classification: a pixel decoder and a transformer decoder."""

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
    """Head that predicts a set of masks from a backbone's maps.

    Attributes:
        pixel_decoder: A module of `PIXEL_DECODER_REGISTRY`.
        predictor: A module of `TRANSFORMER_DECODER_REGISTRY`.
    """

    @configurable
    def __init__(self, pixel_decoder: nn.Module, predictor: nn.Module, in_feature: str = "") -> None:
        """
        Args:
            pixel_decoder: See the class.
            predictor: See the class.
            in_feature: The backbone's map that queries attend to; "": the pixel decoder's levels.
        """
        super().__init__()
        self.pixel_decoder = pixel_decoder
        self.predictor = predictor
        self.in_feature = in_feature

    @classmethod
    def from_config(
        cls, cfg: CfgNode, input_shape: Mapping[str, ShapeSpec], class_embed: nn.Module | None = None
    ) -> dict[str, Any]:
        """Read the constructor arguments from ``MODEL.MASK_FORMER``.

        Args:
            cfg: The configuration.
            input_shape: All maps of the backbone.
            class_embed: The class head; None: a linear layer to ``MODEL.SEM_SEG_HEAD.NUM_CLASSES`` and
                "no object".

        Raises:
            ValueError: If the backbone or the pixel decoder lacks a map that the configuration names.
        """
        keys = cfg.MODEL.MASK_FORMER
        in_feature: str = keys.TRANSFORMER_IN_FEATURE
        if missing := {*keys.IN_FEATURES, *filter(None, [in_feature])} - set(input_shape):
            raise ValueError(
                f"the backbone has the maps {list(input_shape)}, but MODEL.MASK_FORMER.IN_FEATURES and "
                f"TRANSFORMER_IN_FEATURE name {sorted(missing)}"
            )
        shapes = {name: input_shape[name] for name in keys.IN_FEATURES}
        pixel_decoder = PIXEL_DECODER_REGISTRY.get(keys.PIXEL_DECODER.NAME)(cfg, shapes)
        decoder = TRANSFORMER_DECODER_REGISTRY.get(keys.TRANSFORMER_DECODER)
        channels = [input_shape[in_feature].channels] if in_feature else pixel_decoder.level_channels
        if len(channels) != decoder.num_levels:
            raise ValueError(
                f"{keys.TRANSFORMER_DECODER} reads {decoder.num_levels} maps, but MODEL.MASK_FORMER."
                f"TRANSFORMER_IN_FEATURE {in_feature!r} and {keys.PIXEL_DECODER.NAME} provide {len(channels)}"
            )
        if class_embed is None:
            class_embed = LinearClassHead(keys.HIDDEN_DIM, cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES)
        return {
            "pixel_decoder": pixel_decoder,
            "predictor": decoder(cfg, channels[0], class_embed),
            "in_feature": in_feature,
        }

    def forward(self, features: Mapping[str, Tensor]) -> MaskPrediction:
        """Predict masks from the backbone's maps (B, C, h, w) by name."""
        mask_features, levels = self.pixel_decoder(features)
        return self.predictor([features[self.in_feature]] if self.in_feature else levels, mask_features)
