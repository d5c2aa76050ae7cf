"""Feature pyramid network over any trunk."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any, TypeVar

import torch.nn.functional as F
from torch import Tensor, nn

from clipdense.backbone.trunk import JOINT, SCORE

from detectron2.config import CfgNode as CN
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from detectron2.modeling.backbone.fpn import FPN as _FPN
from detectron2.modeling.backbone.fpn import LastLevelMaxPool, LastLevelP6P7


class FPN(_FPN):
    """Detectron2's FPN (Lin et al., CVPR 2017) for maps of any size and stride.

    The coarser map is resized to the exact size of the finer one. Detectron2 doubles its size, but a CLIP
    ResNet rounds down when it pools, so an odd map is not twice the size of the next. For even maps both
    computations agree. Levels are named by the floor of log2 of their stride: 3.5, 7, 14, 28 are "p1" to
    "p4".
    """

    def __init__(self, *args: Any, pad: bool = True, **kwargs: Any) -> None:
        """
        Args:
            pad: whether images are padded to multiples of the coarsest stride of ``in_features``, as
                Detectron2's FPN requires; otherwise only as the trunk requires.
            args, kwargs: arguments of Detectron2's FPN.
        """
        super().__init__(*args, **kwargs)
        self.pad = pad
        strides = self._out_feature_strides  # Detectron2 assumes powers of two for the top levels
        for finer, coarser in itertools.pairwise(strides):
            strides[coarser] = 2 * strides[finer]

    @property
    def size_divisibility(self) -> int:
        """Divisor of the padded images' height and width; 0: no padding."""
        divisor: int = super().size_divisibility if self.pad else self.bottom_up.size_divisibility
        return divisor

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Map normalised images (B, 3, H, W) to maps "p2", "p3" ... of ``out_channels``, fine to coarse."""
        bottom_up = self.bottom_up(x)
        levels: list[Tensor] = []
        merged: Tensor | None = None
        for name, lateral, output in zip(
            self.in_features[::-1], self.lateral_convs, self.output_convs, strict=True
        ):
            finer = lateral(bottom_up[name])
            if merged is not None:
                finer = finer + F.interpolate(merged, size=finer.shape[-2:], mode="nearest")
                if self._fuse_type == "avg":
                    finer = finer / 2
            merged = finer
            levels.insert(0, output(merged))
        if self.top_block is not None:
            source = self.top_block.in_feature
            top = bottom_up[source] if source in bottom_up else levels[self._out_features.index(source)]
            levels.extend(self.top_block(top))
        return dict(zip(self._out_features, levels, strict=True)) | passed_on(bottom_up)

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Return channels and stride of every level, by name."""
        return super().output_shape() | passed_on(self.bottom_up.output_shape())


Output = TypeVar("Output")


def passed_on(outputs: Mapping[str, Output]) -> dict[str, Output]:
    """Select the outputs that a pyramid passes on from its trunk: the score map of a `LanguageTrunk`, the
    joint map of a `FrozenCLIPTrunk`.
    """
    return {name: output for name, output in outputs.items() if name in (SCORE, JOINT)}


def build_top_block(name: str, in_feature: str, in_channels: int, out_channels: int) -> nn.Module | None:
    """Build the levels above a pyramid.

    Args:
        name: "LastLevelMaxPool" (one level, subsampled from the pyramid's last), "LastLevelP6P7" (RetinaNet's
            two levels, by strided convolutions), "LastLevelP6P7NoReLU" (the same without ReLU), or "" (none).
        in_feature: name of the input map.
        in_channels: channels of that map.
        out_channels: channels of the new levels.

    Returns:
        The module, or None.

    Raises:
        ValueError: If the name is unknown.
    """
    if not name:
        return None
    if name == "LastLevelMaxPool":
        block = LastLevelMaxPool()
        block.in_feature = in_feature
        return block
    if name in ("LastLevelP6P7", "LastLevelP6P7NoReLU"):
        block = LastLevelP6P7 if name == "LastLevelP6P7" else LastLevelP6P7NoReLU
        return block(in_channels, out_channels, in_feature)
    raise ValueError(
        "MODEL.FPN.TOP_BLOCK must be LastLevelMaxPool, LastLevelP6P7, LastLevelP6P7NoReLU or empty, "
        f"not {name!r}"
    )


class LastLevelP6P7NoReLU(LastLevelP6P7):
    """P6 and P7 without a ReLU between their convolutions (mmdetection's default for RetinaNet)."""

    def forward(self, c5: Tensor) -> list[Tensor]:
        """Map C5 (B, C, h, w) to P6 and P7."""
        p6 = self.p6(c5)
        return [p6, self.p7(p6)]


def build_trunk(cfg: CN, input_shape: ShapeSpec) -> Backbone:
    """Build the trunk that MODEL.TRUNK.NAME names in Detectron2's backbone registry."""
    trunk = BACKBONE_REGISTRY.get(cfg.MODEL.TRUNK.NAME)(cfg, input_shape)
    assert isinstance(trunk, Backbone)
    return trunk


@BACKBONE_REGISTRY.register()
def build_trunk_fpn_backbone(cfg: CN, input_shape: ShapeSpec) -> FPN:
    """Build the trunk MODEL.TRUNK.NAME with an FPN over MODEL.FPN.IN_FEATURES.

    Raises:
        ValueError: If there is none, or the trunk lacks one of them.
    """
    trunk = build_trunk(cfg, input_shape)
    shapes = trunk.output_shape()
    in_features: list[str] = cfg.MODEL.FPN.IN_FEATURES
    if not in_features:
        raise ValueError(
            f"MODEL.FPN.IN_FEATURES is empty; name maps of {cfg.MODEL.TRUNK.NAME}: {sorted(shapes)}"
        )
    missing = [name for name in in_features if name not in shapes]
    if missing:
        raise ValueError(
            f"MODEL.FPN.IN_FEATURES {missing}: the maps of {cfg.MODEL.TRUNK.NAME} are {sorted(shapes)}. "
            "A trunk with one map, such as a ViT, needs MODEL.BACKBONE.NAME "
            "build_trunk_simple_pyramid_backbone."
        )
    last = in_features[-1]
    top_block: str = cfg.MODEL.FPN.TOP_BLOCK
    return FPN(
        bottom_up=trunk,
        in_features=in_features,
        out_channels=cfg.MODEL.FPN.OUT_CHANNELS,
        norm=cfg.MODEL.FPN.NORM,
        # RetinaNet's extra levels read the trunk's map; the max pool reads the pyramid's.
        top_block=build_top_block(
            top_block,
            last if top_block.startswith("LastLevelP6P7") else last.replace("res", "p"),
            shapes[last].channels,
            cfg.MODEL.FPN.OUT_CHANNELS,
        ),
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
        pad=cfg.MODEL.FPN.PAD,
    )
