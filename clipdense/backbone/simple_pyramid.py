"""ViTDet's simple feature pyramid over a single map."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import fvcore.nn.weight_init as weight_init
from timm.layers import LayerNorm2d
from torch import Tensor, nn

from clipdense.backbone.fpn import build_top_block, build_trunk, passed_on
from clipdense.backbone.trunk import JOINT, SCORE

from detectron2.config import CfgNode as CN
from detectron2.config import configurable
from detectron2.layers import Conv2d, ShapeSpec, get_norm
from detectron2.modeling import BACKBONE_REGISTRY, Backbone


def _norm(name: str, channels: int) -> nn.Module | None:
    """Return Detectron2's norm of that name, or for "LN" a LayerNorm over the channels, which detectron2 0.6
    lacks.
    """
    return LayerNorm2d(channels) if name == "LN" else get_norm(name, channels)


def rescale(scale: float, channels: int, norm: str, *, halve: bool = True) -> tuple[list[nn.Module], int]:
    """Build the layers that change the size of a map by a factor.

    Args:
        scale: the factor, a power of two. Above 1: deconvolutions of stride 2, with norm and GELU between two
            of them. Below 1: max pooling.
        channels: channels of the map.
        norm: "LN" or any norm of Detectron2; "": none.
        halve: whether every deconvolution halves the number of channels.

    Returns:
        The layers, and the number of channels of their output.

    Raises:
        ValueError: If the scale is not a power of two.
    """
    layers: list[nn.Module] = []
    steps = round(math.log2(scale))
    if 2.0**steps != scale:
        raise ValueError(f"SCALE_FACTORS of a pyramid must be powers of two, not {scale}")
    for step in range(steps):
        if step:
            normalisation = _norm(norm, channels)
            layers += [normalisation] if normalisation else []
            layers += [nn.GELU()]
        outputs = channels // 2 if halve else channels
        layers += [nn.ConvTranspose2d(channels, outputs, kernel_size=2, stride=2)]
        channels = outputs
    layers += [nn.MaxPool2d(kernel_size=2, stride=2) for _ in range(-steps)]
    return layers, channels


def as_stride(stride: float) -> Any:
    """Convert a stride without fraction to an integer, for exact anchors and poolers."""
    return int(stride) if stride == int(stride) else stride


class SimpleFeaturePyramid(Backbone):
    """A pyramid whose levels are all computed from the trunk's last map.

    A level is computed by stride-2 deconvolutions (norm and GELU between two of them) or max pooling, then a
    1x1 and a 3x3 convolution, each followed by a norm. Levels are named by the floor of log2 of their stride:
    4 is "p2"; patches of 14 give strides 3.5, 7, 14, 28, named "p1" to "p4".

    Source: Li et al., ViTDet, ECCV 2022, section 3 and appendix A.2.
    """

    @configurable
    def __init__(
        self,
        trunk: Backbone,
        in_feature: str,
        *,
        out_channels: int,
        scale_factors: Sequence[float] = (4.0, 2.0, 1.0, 0.5),
        norm: str = "LN",
        top_block: str = "LastLevelMaxPool",
    ) -> None:
        """
        Args:
            trunk: any backbone.
            in_feature: name of the trunk's map that the levels are computed from.
            out_channels: channels of every level.
            scale_factors: size of each level relative to that map; powers of two, from fine to coarse.
            norm: "LN" or any norm of Detectron2; "": none.
            top_block: see :func:`build_top_block`.

        Raises:
            ValueError: If the factors do not decrease, or are not powers of two.
        """
        super().__init__()
        shape = trunk.output_shape()[in_feature]
        strides = [shape.stride / scale for scale in scale_factors]
        if sorted(strides) != strides:
            raise ValueError(
                f"MODEL.SIMPLE_PYRAMID.SCALE_FACTORS {list(scale_factors)} must decrease, from fine to coarse"
            )
        self.trunk = trunk
        self.in_feature = in_feature
        self.levels = nn.ModuleList()
        for scale in scale_factors:
            layers, channels = rescale(scale, shape.channels, norm)
            for kernel_size in (1, 3):
                layers += [
                    Conv2d(
                        channels,
                        out_channels,
                        kernel_size,
                        padding=kernel_size // 2,
                        bias=not norm,
                        norm=_norm(norm, out_channels),
                    )
                ]
                weight_init.c2_xavier_fill(layers[-1])
                channels = out_channels
            self.levels.append(nn.Sequential(*layers))
        names = [f"p{int(math.log2(stride))}" for stride in strides]
        self.top_block = build_top_block(top_block, names[-1], out_channels, out_channels)
        for _ in range(getattr(self.top_block, "num_levels", 0)):
            strides.append(strides[-1] * 2)
            names.append(f"p{int(math.log2(strides[-1]))}")
        self._shapes = {
            name: ShapeSpec(channels=out_channels, stride=as_stride(stride))
            for name, stride in zip(names, strides, strict=True)
        }
        coarsest = shape.stride / min(scale_factors)
        self._size_divisibility = math.lcm(int(max(coarsest, shape.stride)), max(trunk.size_divisibility, 1))

    @classmethod
    def from_config(cls, cfg: CN, input_shape: ShapeSpec) -> dict[str, object]:
        trunk = build_trunk(cfg, input_shape)
        return {
            "trunk": trunk,
            "in_feature": cfg.MODEL.SIMPLE_PYRAMID.IN_FEATURE
            or [name for name in trunk.output_shape() if name not in (SCORE, JOINT)][-1],
            "out_channels": cfg.MODEL.FPN.OUT_CHANNELS,
            "scale_factors": cfg.MODEL.SIMPLE_PYRAMID.SCALE_FACTORS,
            "norm": cfg.MODEL.SIMPLE_PYRAMID.NORM,
            "top_block": cfg.MODEL.FPN.TOP_BLOCK,
        }

    @property
    def size_divisibility(self) -> int:
        """Divisor of the padded images' height and width."""
        return self._size_divisibility

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Return channels and stride of every level, by name; with patches of 14, strides have fractions."""
        return self._shapes | passed_on(self.trunk.output_shape())

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Map normalised images (B, 3, H, W) to maps (B, out_channels, h, w) by name, fine to coarse."""
        features = self.trunk(images)
        levels = [level(features[self.in_feature]) for level in self.levels]
        if self.top_block is not None:
            levels += self.top_block(levels[-1])
        return dict(zip(self._shapes, levels, strict=True)) | passed_on(features)


@BACKBONE_REGISTRY.register()
def build_trunk_simple_pyramid_backbone(cfg: CN, input_shape: ShapeSpec) -> SimpleFeaturePyramid:
    """Build the trunk MODEL.TRUNK.NAME with a simple feature pyramid (MODEL.SIMPLE_PYRAMID, MODEL.FPN)."""
    return SimpleFeaturePyramid(cfg, input_shape)
