"""Two encoders side by side: the maps of one, the score map of the other."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clipdense.backbone.language import LanguageTrunk
from clipdense.backbone.trunk import SCORE

from detectron2.config import CfgNode as CN
from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone

__all__ = ["BesideTrunk"]


@BACKBONE_REGISTRY.register()
class BesideTrunk(Backbone):
    """A trunk whose last map has the class scores of a language trunk on another encoder.

    For encoders that are not trained with text, such as SAM's: CLIP beside them computes the score map, which
    is resized to the last map.
    """

    @configurable
    def __init__(self, trunk: Backbone, language: LanguageTrunk) -> None:
        """
        Args:
            trunk: any trunk without a score map.
            language: the trunk that scores; its other maps are not used.

        Raises:
            ValueError: If the trunk has a score map of its own.
        """
        super().__init__()
        shapes = dict(trunk.output_shape())
        if SCORE in shapes:
            raise ValueError(f"MODEL.LANGUAGE.BESIDE: a {type(trunk).__name__} has a score map of its own")
        self.trunk, self.language = trunk, language
        self.scored = list(shapes)[-1]
        score, last = language.output_shape()[SCORE], shapes[self.scored]
        shapes[self.scored] = ShapeSpec(channels=last.channels + score.channels, stride=last.stride)
        self._shapes = shapes | {SCORE: score}

    @classmethod
    def from_config(cls, cfg: CN, input_shape: ShapeSpec) -> dict[str, Any]:
        trunk = BACKBONE_REGISTRY.get(cfg.MODEL.LANGUAGE.BESIDE)
        return {"trunk": trunk(cfg, input_shape), "language": LanguageTrunk(cfg, input_shape)}

    @property
    def size_divisibility(self) -> int:
        """Divisor of the padded images' height and width, for both encoders."""
        return math.lcm(max(self.trunk.size_divisibility, 1), max(self.language.size_divisibility, 1))

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Return channels and stride of every map, by name, "score" last."""
        return dict(self._shapes)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Compute the trunk's maps with the scores appended to the last, and the score map.

        Args:
            images: normalised images (B, 3, H, W).

        Returns:
            Maps by name; "score" is s (B, K, h, w), logits, of the size of the language trunk's.
        """
        maps: dict[str, Tensor] = dict(self.trunk(images))
        score = self.language(images)[SCORE]
        last = maps[self.scored]
        resized = F.interpolate(score, last.shape[-2:], mode="bilinear", align_corners=False)
        maps[self.scored] = torch.cat([last, self.language.appended(resized)], dim=1)
        return {**maps, SCORE: score}
