"""Blocks of a CLIP ViT at the strides of a pyramid, as a trunk that is trained."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from clipdense.backbone.clip_trunk import CLIPTrunk
from clipdense.backbone.simple_pyramid import as_stride, rescale
from clipdense.clip.model import ClipModel
from clipdense.clip.towers import Tower, TowerOutput, TowerRequest, TransformerTower

from detectron2.config import CfgNode as CN
from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY

__all__ = ["CLIPBlockTrunk"]


@BACKBONE_REGISTRY.register()
class CLIPBlockTrunk(CLIPTrunk):
    """Outputs of several blocks of a CLIP ViT, rescaled to the strides of a pyramid.

    The output of the i-th block (residual stream, without the class token) is rescaled by the i-th factor: 4
    by two deconvolutions of stride 2 with a norm and GELU between them, 2 by one deconvolution, 1/2 by max
    pooling. The number of channels stays. Maps are named by the floor of log2 of their stride: 4 is "res2".
    `FrozenCLIPTrunk` below `InterpolatedTrunk` computes the same from a frozen tower.

    Source: the ViT segmentor of the code of Rao et al., DenseCLIP, CVPR 2022.
    """

    @configurable
    def __init__(
        self,
        tower: Tower | ClipModel,
        *,
        blocks: Sequence[int],
        scale_factors: Sequence[float] = (4.0, 2.0, 1.0, 0.5),
        level_norm: str = "BN",
        group_norm: bool = False,
        **kwargs: Any,
    ) -> None:
        """
        Args:
            tower: image tower of a ViT.
            blocks: indices of the blocks, from 0.
            scale_factors: size of each level relative to the map of its block; powers of two, from fine to
                coarse.
            level_norm: norm between two deconvolutions, any norm of Detectron2 or "LN".
            group_norm: whether each map first goes through a group norm of one group.
            kwargs: arguments of `CLIPTrunk`.

        Raises:
            ValueError: If the tower is not a ViT or lacks a block, if the numbers of blocks and factors
                differ, or if the factors do not decrease.
        """
        super().__init__(tower, **kwargs)
        if not isinstance(self.tower, TransformerTower):
            raise ValueError(f"CLIPBlockTrunk needs a ViT, not a {type(self.tower).__name__}: use CLIPTrunk")
        channels = self.tower.tap_channels
        if not blocks or (unknown := [i for i in blocks if i not in channels]):
            raise ValueError(
                f"MODEL.TRUNK.BLOCKS is {list(blocks)}: give indices of blocks, which are 0..{max(channels)}"
                + (f"; it has no {unknown}" if blocks else "")
            )
        if len(blocks) != len(scale_factors) or sorted(scale_factors, reverse=True) != list(scale_factors):
            raise ValueError(
                f"MODEL.INTERPOLATED.SCALE_FACTORS {list(scale_factors)} must decrease, with one factor for "
                f"each of MODEL.TRUNK.BLOCKS {list(blocks)}"
            )
        self._request = TowerRequest(taps=tuple(blocks))
        self._outputs = {}
        self.levels = nn.ModuleList()
        for block, scale in zip(blocks, scale_factors, strict=True):
            width = channels[block]
            layers, _ = rescale(scale, width, level_norm, halve=False)
            self.levels.append(nn.Sequential(*([nn.GroupNorm(1, width)] if group_norm else []), *layers))
            stride = as_stride(self.tower.stride / scale)
            self._outputs[f"res{int(math.log2(stride))}"] = ShapeSpec(channels=width, stride=stride)

    @classmethod
    def from_config(cls, cfg: CN, input_shape: ShapeSpec) -> dict[str, Any]:
        keys = cfg.MODEL.INTERPOLATED
        return super().from_config(cfg, input_shape) | {
            "blocks": cfg.MODEL.TRUNK.BLOCKS,
            "scale_factors": keys.SCALE_FACTORS,
            "level_norm": keys.NORM,
            "group_norm": keys.GROUP_NORM,
            "out_features": (),
        }

    def _maps(self, out: TowerOutput) -> dict[str, Tensor]:
        maps = zip(self._outputs, self.levels, out.taps, strict=True)
        return {name: level(tap) for name, level, (tap, _) in maps}
