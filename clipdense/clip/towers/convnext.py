"""ConvNeXt CLIP through timm: C2 to C5, and its MLP head for every position, region or mask."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from open_clip.timm_model import TimmModel
from timm.models.convnext import ConvNeXt
from torch import Tensor, nn

from clipdense.clip.roi_align import roi_align
from clipdense.clip.towers.base import Tower, TowerOutput, TowerRequest, to_map


class ConvNeXtTower(Tower):
    """ConvNeXt (specs/clipself_fvlm_catseg_odise_fcclip.md 4.2).

    `pre` is norm_pre(C5), FC-CLIP's dense map; `dense` "plain" sends each position of it through the head as
    if it were the pooled vector. There are no position tables, so `position_rule` has no effect.
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

    def features(self, images: Tensor, want: TowerRequest) -> TowerOutput:
        """Stem and four stages, then the head; stages beyond the last one wanted do not run."""
        trunk: Any = self.trunk
        out = TowerOutput()
        whole = want.pre or want.pooled or want.dense is not None
        maps, x = {}, trunk.stem(images)
        for tap in range(2, 6 if whole else max(want.taps, default=1) + 1):
            x = trunk.stages[tap - 2](x)
            if tap in want.taps:
                maps[tap] = x
        out.taps = [(maps[tap], self.tap_strides[tap]) for tap in want.taps]
        if whole:
            x = trunk.norm_pre(x)
        if want.pre:
            out.pre = x
        if want.dense is not None:
            h, w = x.shape[-2:]
            out.dense = to_map(self.project(x.flatten(2).transpose(1, 2)), (h, w))
        if want.pooled:
            out.pooled = self.project(x.mean((2, 3))[:, None])[:, 0]
        return out

    def project(self, x: Tensor) -> Tensor:
        """Pooled or single vectors of `pre` (B, N, C) -> joint space (B, N, D): trunk head, then open_clip's
        head.
        """
        trunk: Any = self.trunk
        cells = x.flatten(0, 1)[:, :, None, None]
        y: Tensor = self.head(trunk.head(cells))
        return y.reshape(*x.shape[:2], -1)

    def embed_boxes(self, features: Tensor, boxes: Sequence[Tensor]) -> Tensor:
        """The head of each box's RoIAlign mean (1 x 1, aligned, adaptive sampling)."""
        rois = roi_align(features, boxes, (1, 1), scale=1 / self.stride)
        return self.project(rois.flatten(1)[:, None])[:, 0]

    def embed_masks(self, features: Tensor, masks: Tensor) -> Tensor:
        """The head of each mask's weighted mean, sum(f m) / (sum m + 1e-8); an empty mask is the head of the
        zero vector.
        """
        weights = masks.flatten(2).to(features.dtype)
        pooled = weights @ features.flatten(2).transpose(1, 2) / (weights.sum(2, keepdim=True) + 1e-8)
        return self.project(pooled)
