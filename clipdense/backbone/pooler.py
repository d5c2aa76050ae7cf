"""RoIAlign over the levels of a pyramid with any strides."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipdense.clip.roi_align import roi_align

from detectron2.structures import Boxes

__all__ = ["AnyStridePooler"]


class AnyStridePooler(nn.Module):
    """`ROIPooler` for strides that are not powers of two, such as 3.5, 7, 14, 28 of patches of 14.

    A box of w x h pixels is pooled from level floor(log2(sqrt(w h) / finest + 1e-6)), clamped to the existing
    levels. With strides 4 to 32 and finest 56, this is Detectron2's rule.

    Source: the detector F-ViT of Wu et al., CLIPSelf, ICLR 2024.
    """

    def __init__(
        self, output_size: int, strides: Sequence[float], *, finest: float = 56.0, sampling_ratio: int = 0
    ) -> None:
        """
        Args:
            output_size: cells of the result along each axis.
            strides: strides of the levels in pixels, from fine to coarse.
            finest: boxes smaller than twice this size, in pixels, are pooled from the finest level.
            sampling_ratio: sampling points per cell and axis; 0: as many as the map has cells there.

        Raises:
            ValueError: If the strides do not increase.
        """
        super().__init__()
        if any(finer >= coarser for finer, coarser in itertools.pairwise(strides)):
            raise ValueError(f"the strides of the levels must increase, from fine to coarse: {list(strides)}")
        self.output_size, self.strides = output_size, tuple(strides)
        self.finest, self.sampling_ratio = finest, sampling_ratio

    def forward(self, features: Sequence[Tensor], boxes: Sequence[Boxes]) -> Tensor:
        """Pool boxes from the levels that match their sizes.

        Args:
            features: maps (B, C, h, w) of the levels, from fine to coarse.
            boxes: the boxes of each image, in pixels.

        Returns:
            (N, C, output_size, output_size), image by image.
        """
        side = self.output_size
        rois = torch.cat([F.pad(b.tensor.float(), (1, 0), value=float(i)) for i, b in enumerate(boxes)])
        levels = self.levels(rois[:, 1:]).nan_to_num(0.0)
        order = levels.argsort(stable=True)
        numbers = torch.arange(len(self.strides), device=levels.device)
        counts = (levels[:, None] == numbers).sum(0).tolist()  # one wait for the device, not one a level
        pooled = features[0].new_zeros(len(rois), features[0].shape[1], side, side)
        for feature, stride, chosen in zip(features, self.strides, order.split(counts), strict=True):
            cells = roi_align(
                feature, rois[chosen], side, scale=1 / stride, sampling_ratio=self.sampling_ratio
            )
            pooled.index_copy_(0, chosen, cells)
        return pooled

    def levels(self, boxes: Tensor) -> Tensor:
        """Return the level, a whole number as a float, that each box (N, 4) is pooled from: (N,)."""
        size = (boxes[:, 2:] - boxes[:, :2]).clamp(min=0).prod(1).sqrt()
        return torch.log2(size / self.finest + 1e-6).floor().clamp(0, len(self.strides) - 1)
