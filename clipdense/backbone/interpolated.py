"""Outputs of ViT blocks at the strides of a pyramid."""

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
    """Maps of several blocks, all of one stride, rescaled to the strides of a pyramid.

    The i-th map is rescaled by the i-th factor: 4 by two deconvolutions of stride 2 with a norm and GELU
    between them, 2 by one deconvolution, 1/2 by max pooling. The number of channels stays. The result is a
    trunk for an FPN. Maps are named by the floor of log2 of their stride: 4 is "res2"; patches of 14 give
    strides 3.5, 7, 14, 28, named "res1" to "res4".

    Source: the detector F-ViT of Wu et al., CLIPSelf, ICLR 2024.
    """

    @configurable
    def __init__(
        self, trunk: Backbone, *, scale_factors: Sequence[float] = (4.0, 2.0, 1.0, 0.5), norm: str = "BN"
    ) -> None:
        """
        Args:
            trunk: a backbone with one map per factor, in this order; "joint" is passed on.
            scale_factors: size of each level relative to its map; powers of two, from fine to coarse.
            norm: norm between two deconvolutions, any norm of Detectron2 or "LN".

        Raises:
            ValueError: If the numbers of maps and factors differ, or the factors do not decrease.
        """
        super().__init__()
        shapes = {name: shape for name, shape in trunk.output_shape().items() if name != JOINT}
        if len(shapes) != len(scale_factors) or sorted(scale_factors, reverse=True) != list(scale_factors):
            raise ValueError(
                f"MODEL.INTERPOLATED.SCALE_FACTORS {list(scale_factors)} must decrease, with one "
                f"factor for each of the trunk's maps {list(shapes)} (MODEL.FROZEN_CLIP.BLOCKS)"
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
        """Divisor of the padded images' height and width, which is the trunk's."""
        return self.trunk.size_divisibility

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Return channels and stride of every map, by name."""
        return self._shapes | passed_on(self.trunk.output_shape())

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Map normalised images (B, 3, H, W) to maps (B, C, h, w) by name, from fine to coarse."""
        maps = self.trunk(images)
        levels = [level(maps[name]) for name, level in zip(self._sources, self.levels, strict=True)]
        return dict(zip(self._shapes, levels, strict=True)) | passed_on(maps)
