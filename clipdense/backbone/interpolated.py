"""A ViT's blocks at the strides of a pyramid."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from clipdense.backbone.fpn import passed_on
from clipdense.backbone.frozen_clip import FrozenCLIPTrunk
from clipdense.backbone.simple_pyramid import as_stride, rescale
from clipdense.backbone.trunk import JOINT

from detectron2.config import CfgNode as CN
from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone

__all__ = ["InterpolatedTrunk"]


@BACKBONE_REGISTRY.register()
class InterpolatedTrunk(Backbone):
    """Maps of several blocks, of one stride, brought to the strides of a pyramid (F-ViT,
    specs/clipself_fvlm_catseg_odise_fcclip.md 2.2).

    The i-th block's map is scaled by the i-th factor: 4 by two deconvolutions of stride 2 with a norm and
    GELU between them, 2 by one, 1/2 by max pooling; channels stay. What results is a trunk for an FPN:
    stride 4 is "res2"; a patch of 14 gives 3.5, 7, 14, 28, which are "res1" to "res4" (floor of the
    logarithm, as the FPN names its levels).
    """

    @configurable
    def __init__(
        self, trunk: Backbone, *, scale_factors: Sequence[float] = (4.0, 2.0, 1.0, 0.5), norm: str = "BN"
    ) -> None:
        """
        Args:
            trunk: gives one map a factor, in this order; "joint" is passed on.
            scale_factors: size of each level relative to its map, powers of two, from fine to coarse.
            norm: between two deconvolutions, any norm of Detectron2 or "LN".

        Raises:
            ValueError: another number of maps than of factors, or factors that do not fall.
        """
        super().__init__()
        shapes = {name: shape for name, shape in trunk.output_shape().items() if name != JOINT}
        if len(shapes) != len(scale_factors) or sorted(scale_factors, reverse=True) != list(scale_factors):
            raise ValueError(
                f"MODEL.INTERPOLATED.SCALE_FACTORS {list(scale_factors)} must fall, and be as many as the "
                f"trunk's maps {list(shapes)} (MODEL.FROZEN_CLIP.BLOCKS)"
            )
        self.trunk = trunk
        self.levels = nn.ModuleList()
        self._shapes: dict[str, ShapeSpec] = {}
        for scale, shape in zip(scale_factors, shapes.values(), strict=True):
            layers, channels = rescale(scale, shape.channels, norm, halve=False)
            self.levels.append(nn.Sequential(*layers))
            stride = as_stride(shape.stride / scale)
            self._shapes[f"res{int(math.log2(stride))}"] = ShapeSpec(channels=channels, stride=stride)
        self._sources = tuple(shapes)

    @classmethod
    def from_config(cls, cfg: CN, input_shape: ShapeSpec) -> dict[str, Any]:
        keys = cfg.MODEL.INTERPOLATED
        return {
            "trunk": FrozenCLIPTrunk(cfg, input_shape),
            "scale_factors": keys.SCALE_FACTORS,
            "norm": keys.NORM,
        }

    @property
    def size_divisibility(self) -> int:
        """The trunk's."""
        return self.trunk.size_divisibility

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Channels and stride of every map, by name."""
        return self._shapes | passed_on(self.trunk.output_shape())

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Normalised images (B, 3, H, W) -> maps (B, C, h, w) by name, from fine to coarse."""
        maps = self.trunk(images)
        levels = [level(maps[name]) for name, level in zip(self._sources, self.levels, strict=True)]
        return dict(zip(self._shapes, levels, strict=True)) | passed_on(maps)
