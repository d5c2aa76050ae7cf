"""ConvNeXt CLIP through timm: C2 to C5, and its head for positions, boxes and masks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from open_clip.timm_model import TimmModel
from timm.models.convnext import ConvNeXt
from torch import Tensor, nn

from clipdense.clip.roi_align import roi_align
from clipdense.clip.towers.base import Tower, TowerOutput, TowerRequest, to_map
from clipdense.clip.towers.groups import TowerGroups, norm_parameters


class ConvNeXtTower(Tower):
    """ConvNeXt of open_clip.

    `pre` is norm_pre(C5), the dense map of FC-CLIP (Yu et al., NeurIPS 2023). `dense` in mode "plain" applies
    the head to each of its positions as if it were the pooled vector. There are no position tables, so
    `position_rule` has no effect.
    """

    trunk: ConvNeXt
    head: nn.Module

    def __init__(self, visual: TimmModel, position_rule: str = "bicubic") -> None:
        super().__init__(visual, position_rule)
        trunk: Any = self.trunk
        if type(trunk.head).__name__ != "NormMlpClassifierHead":
            raise ValueError(f"a ConvNeXt with head {type(trunk.head).__name__} is not supported")
        self.image_size = (visual.image_size[0], visual.image_size[1])
        self.tap_channels = {i + 2: info["num_chs"] for i, info in enumerate(trunk.feature_info)}
        self.tap_strides = {i + 2: info["reduction"] for i, info in enumerate(trunk.feature_info)}
        self.stride = self.tap_strides[5]
        self.grid = (self.image_size[0] // self.stride, self.image_size[1] // self.stride)
        linears = [m for part in (trunk.head, self.head) for m in part.modules() if isinstance(m, nn.Linear)]
        self.embed_dim = linears[-1].out_features

    def features(self, images: Tensor, request: TowerRequest) -> TowerOutput:
        """Run the stem, the stages up to the last requested one, and the head if it is needed."""
        trunk: Any = self.trunk
        out = TowerOutput()
        whole = request.pre or request.pooled or request.dense is not None
        maps, x = {}, trunk.stem(images)
        for tap in range(2, 6 if whole else max(request.taps, default=1) + 1):
            x = trunk.stages[tap - 2](x)
            if tap in request.taps:
                maps[tap] = x
        out.taps = [(maps[tap], self.tap_strides[tap]) for tap in request.taps]
        if whole:
            x = trunk.norm_pre(x)
        if request.pre:
            out.pre = x
        if request.dense is not None:
            h, w = x.shape[-2:]
            out.dense = to_map(self.project(x.flatten(2).transpose(1, 2)), (h, w))
        if request.pooled:
            out.pooled = self.project(x.mean((2, 3))[:, None])[:, 0]
        return out

    def groups(self) -> TowerGroups:
        """See `Tower.groups`; the blocks are the four stages."""
        trunk: Any = self.trunk
        return TowerGroups(
            stem=(trunk.stem,),
            blocks=tuple(trunk.stages),
            projection=(trunk.norm_pre, trunk.head, self.head),
            positions=(),
            norms=norm_parameters(self),
            attentions=(),
        )

    def project(self, x: Tensor) -> Tensor:
        """Map vectors of `pre` (B, N, C) to the joint space (B, N, D): trunk head, then open_clip's head."""
        trunk: Any = self.trunk
        cells = x.flatten(0, 1)[:, :, None, None]
        y: Tensor = self.head(trunk.head(cells))
        return y.reshape(*x.shape[:2], -1)

    def embed_boxes(self, features: Tensor, boxes: Sequence[Tensor]) -> Tensor:
        """Apply the head to the RoIAlign mean of each box (1 x 1, aligned, adaptive sampling)."""
        rois = roi_align(features, boxes, (1, 1), scale=1 / self.stride)
        return self.project(rois.flatten(1)[:, None])[:, 0]

    def embed_masks(self, features: Tensor, masks: Tensor) -> Tensor:
        """Apply the head to the weighted mean of each mask, sum(f m) / (sum m + 1e-8).

        An empty mask gives the head's result for the zero vector.
        """
        weights = masks.flatten(2).to(features.dtype)
        pooled = weights @ features.flatten(2).transpose(1, 2) / (weights.sum(2, keepdim=True) + 1e-8)
        return self.project(pooled)
