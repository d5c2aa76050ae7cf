"""RoIAlign over the levels of a pyramid of any strides."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from clipdense.clip.roi_align import roi_align

from detectron2.structures import Boxes

__all__ = ["AnyStridePooler"]


class AnyStridePooler(nn.Module):
    """`ROIPooler` for strides that are no powers of two, such as 3.5, 7, 14, 28 of patches of 14.

    A box of w x h pixels is pooled from level floor(log2(sqrt(w h) / finest + 1e-6)), clamped to the levels
    that there are (F-ViT, specs/clipself_fvlm_catseg_odise_fcclip.md 2.2). With strides 4 to 32 and finest
    56 that is Detectron2's rule.
    """

    def __init__(
        self, output_size: int, strides: Sequence[float], *, finest: float = 56.0, sampling_ratio: int = 0
    ) -> None:
        """
        Args:
            output_size: cells of the result, along each axis.
            strides: of the levels in pixels, from fine to coarse.
            finest: boxes below twice this size, in pixels, are pooled from the finest level.
            sampling_ratio: points a cell and axis; 0: as many as the map has cells there.

        Raises:
            ValueError: strides that do not rise.
        """
        super().__init__()
        if any(a >= b for a, b in zip(strides, strides[1:], strict=False)):
            raise ValueError(f"the strides of the levels must rise, from fine to coarse: {list(strides)}")
        self.output_size, self.strides = output_size, tuple(strides)
        self.finest, self.sampling_ratio = finest, sampling_ratio

    def forward(self, features: Sequence[Tensor], boxes: Sequence[Boxes]) -> Tensor:
        """Maps (B, C, h, w) of the levels, and the boxes of each image -> (N, C, output_size, output_size),
        image by image.
        """
        index = torch.repeat_interleave(
            torch.arange(len(boxes), device=features[0].device),
            torch.tensor([len(b) for b in boxes], device=features[0].device),
        )
        corners = torch.cat([b.tensor for b in boxes]).float()
        rois = torch.cat([index[:, None].to(corners), corners], dim=1)
        if len(self.strides) == 1:
            return self._pool(features[0], rois, self.strides[0])
        size = (corners[:, 2:] - corners[:, :2]).clamp(min=0).prod(1).sqrt()
        levels = torch.log2(size / self.finest + 1e-6).floor().clamp(0, len(self.strides) - 1)
        side = self.output_size
        pooled = features[0].new_zeros(len(rois), features[0].shape[1], side, side)
        for level, (feature, stride) in enumerate(zip(features, self.strides, strict=True)):
            chosen = (levels == level).nonzero().squeeze(1)
            pooled.index_copy_(0, chosen, self._pool(feature, rois[chosen], stride))
        return pooled

    def _pool(self, feature: Tensor, rois: Tensor, stride: float) -> Tensor:
        return roi_align(
            feature, rois, self.output_size, scale=1 / stride, sampling_ratio=self.sampling_ratio
        )
