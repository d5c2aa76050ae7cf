"""Masked crops: the images that two-stage systems show CLIP, one for each mask proposal.

The published crops of OVSeg (Liang et al., CVPR 2023), zsseg (Xu et al., ECCV 2022) and ZegFormer (Ding et
al., CVPR 2022) are settings of one `CropRule`. Equal masks share a crop, and empty masks have none:
`MaskCrops.index` maps masks to crops.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from clipdense.clip.roi_align import roi_align
from clipdense.regions.boxes import mask_extent
from clipdense.regions.lazy_maps import WHOLE, slices

__all__ = ["CROP_RULES", "CropRule", "MaskCrops", "crop_masks", "expand_boxes", "get_crop_rule"]

Sampling = Literal["bicubic", "roi_align", "stretch"]
Fill = Literal["mean", "zero"]


@dataclass(frozen=True)
class CropRule:
    """Settings that turn a mask into a square image for CLIP. The aspect ratio is not kept.

    Attributes:
        threshold: A pixel is inside the mask if its value is greater.
        sampling: "bicubic" resizes the tight box (ends exclusive) without anti-aliasing, and no tap reads
            beyond the box. "roi_align" averages over the box that ends at the last pixels inside; a box
            without area becomes the whole image (ZegFormer). "stretch" always resizes the whole image, and
            interpolates the mask before the threshold (ZegFormer's "mask").
        masked: Paint the pixels outside the mask with `fill`.
        fill: "mean" is CLIP's pixel mean, "zero" is black.
        expand: Scale of the box about its centre, above 0. Corners are truncated to whole pixels and clipped
            to the image; a box keeps at least one pixel. Below 1 the box shrinks.
        soft: Blend with the mask's values instead of the pixels above the threshold (OVSeg's "matting").
        keep_empty: Give empty masks a crop of the whole image.
        padded_logits: The rule reads mask logits of the padded image (ZegFormer) instead of probabilities of
            the image without padding.

    Raises:
        ValueError: If sampling or fill is unknown, expand is not above 0, or another sampling than "bicubic"
            has a setting that only "bicubic" supports.
    """

    threshold: float = 0.5
    sampling: Sampling = "bicubic"
    masked: bool = True
    fill: Fill = "mean"
    expand: float = 1.0
    soft: bool = False
    keep_empty: bool = False
    padded_logits: bool = False

    @property
    def probability_threshold(self) -> float:
        """The threshold as a mask probability, also for rules that read logits."""
        return 1 / (1 + math.exp(-self.threshold)) if self.padded_logits else self.threshold

    @classmethod
    def from_config(cls, node: Mapping[str, Any]) -> CropRule:
        """Build the rule from a config node whose keys are this class's attributes in capitals."""
        return cls(**{key.lower(): value for key, value in node.items()})

    def config_keys(self) -> dict[str, Any]:
        """Return the keys and values of a config node that `from_config` reads."""
        return {field.name.upper(): getattr(self, field.name) for field in fields(self)}

    def __post_init__(self) -> None:
        for name, choices in (("sampling", Sampling), ("fill", Fill)):
            if getattr(self, name) not in get_args(choices):
                raise ValueError(
                    f"{name} must be one of {', '.join(get_args(choices))}, not '{getattr(self, name)}'"
                )
        if self.expand <= 0:
            raise ValueError(f"expand must be above 0, not {self.expand}")
        if self.sampling != "bicubic" and (self.fill, self.expand, self.soft) != ("mean", 1.0, False):
            raise ValueError(f"fill, expand and soft require sampling 'bicubic': {self}")


CROP_RULES: dict[str, CropRule] = {
    "ovseg": CropRule(threshold=0.4),
    "zsseg": CropRule(),
    "zegformer_cropmask": CropRule(0.0, "roi_align", keep_empty=True, padded_logits=True),
    "zegformer_crop": CropRule(0.0, "roi_align", masked=False, keep_empty=True, padded_logits=True),
    "zegformer_mask": CropRule(0.0, "stretch", keep_empty=True, padded_logits=True),
}


def get_crop_rule(rule: str | CropRule) -> CropRule:
    """Return a rule by name; a rule is returned as it is.

    Raises:
        ValueError: If the name is unknown.
    """
    if isinstance(rule, CropRule):
        return rule
    if rule not in CROP_RULES:
        raise ValueError(f"unknown crop rule '{rule}'; known: {', '.join(CROP_RULES)}")
    return CROP_RULES[rule]


@dataclass(frozen=True)
class MaskCrops:
    """Crops of one image's masks, whose pixels are computed on request.

    Attributes:
        rule: The settings.
        valid: (Q,) bool, the masks that have a crop.
        index: (V,) int64, the crop of each valid mask in their order; equal masks share one.
        boxes: (N, 4) int64 xyxy, ends exclusive, the part of the image in each crop.
        source: (N,) int64, the mask of each crop.
        image: (3, H, W), normalised with CLIP's statistics and padded with their mean.
        masks: (Q, H, W).
        fill: (3, 1, 1), normalised colour of the pixels outside the masks.
        size: Side of the crops in pixels.
    """

    rule: CropRule
    valid: Tensor
    index: Tensor
    boxes: Tensor
    source: Tensor
    image: Tensor
    masks: Tensor
    fill: Tensor
    size: int

    def __len__(self) -> int:
        return len(self.source)

    def parts(self, size: int) -> Iterator[slice]:
        """Split the crops into slices of at most `size`."""
        for start in range(0, len(self), size):
            yield slice(start, start + size)

    def regions(self, part: slice = slice(None), *, batched: bool | None = None) -> Tensor:
        """Compute normalised crops (n, 3, size, size).

        Args:
            part: Which crops.
            batched: Resize all bicubic crops in one operation. None: on accelerators only, where many small
                kernels wait for each other; on a CPU one interpolation per crop does less arithmetic.
        """
        boxes, source = self.boxes[part], self.source[part]
        if not len(source):
            return self.image.new_zeros(0, 3, self.size, self.size)
        if self.rule.sampling == "roi_align":
            return self._roi_align(boxes, source)
        if self.rule.sampling == "stretch":
            return self._stretch(source)
        if batched is None:
            batched = self.image.device.type != "cpu"
        return self._bicubic_batched(boxes, source) if batched else self._bicubic_each(boxes, source)

    def region_masks(self, part: slice = slice(None)) -> Tensor:
        """Resize the masks to the crops (n, 1, size, size) by nearest neighbour: 0 or 1, or the mask's values
        under a soft rule.
        """
        boxes, source = self.boxes[part], self.source[part, None, None]
        x, y = (_nearest(boxes[:, axis], boxes[:, axis + 2], self.size) for axis in (0, 1))
        return self._weights(self.masks[source, y[:, :, None], x[:, None, :]])[:, None]

    def _weights(self, masks: Tensor) -> Tensor:
        return (masks if self.rule.soft else masks > self.rule.threshold).to(self.image.dtype)

    def _blend(self, image: Tensor, masks: Tensor) -> Tensor:
        if self.rule.soft:
            return torch.lerp(self.fill, image, masks.to(image.dtype))
        return torch.where(masks > self.rule.threshold, image, self.fill)

    def _bicubic_each(self, boxes: Tensor, source: Tensor) -> Tensor:
        regions = self.image.new_empty(len(source), 3, self.size, self.size)
        for region, (x0, y0, x1, y1), i in zip(regions, boxes.tolist(), source.tolist(), strict=True):
            inside = self.image[:, y0:y1, x0:x1]
            if self.rule.masked:
                inside = self._blend(inside, self.masks[i, y0:y1, x0:x1])
            size = (self.size, self.size)
            region.copy_(F.interpolate(inside[None], size, mode="bicubic", align_corners=False)[0])
        return regions

    def _bicubic_batched(self, boxes: Tensor, source: Tensor) -> Tensor:
        """Sum (image - fill) * mask over the 4 x 4 taps, each gathered for all crops at once, and add fill.

        Neither torch nor torchvision resizes boxes of different sizes in one call with these numbers:
        `F.interpolate` takes one size, and `F.grid_sample(mode="bicubic")` clamps taps to the image instead
        of the box, where they would read the pixels around the crop.
        """
        columns, across = _taps(boxes[:, 0], boxes[:, 2], self.size)
        rows, down = _taps(boxes[:, 1], boxes[:, 3], self.size)
        image = self.image - self.fill
        regions = image.new_zeros(3, len(source), self.size, self.size)
        for i in range(4):
            for j in range(4):
                y, x = rows[:, :, None, i], columns[:, None, :, j]
                weight = down[:, :, None, i] * across[:, None, :, j]
                if self.rule.masked:
                    weight = weight * self._weights(self.masks[source[:, None, None], y, x])
                regions += image[:, y, x] * weight
        return regions.transpose(0, 1) + self.fill

    def _roi_align(self, boxes: Tensor, source: Tensor) -> Tensor:
        rois = boxes.to(self.image.dtype)
        rois[:, 2:] -= 1  # ZegFormer's boxes end at the last pixel inside
        without_area = (rois[:, 2:] <= rois[:, :2]).any(1)
        height, width = self.image.shape[1:]
        rois = torch.where(without_area[:, None], rois.new_tensor([0, 0, width, height]), rois)
        if not self.rule.masked:
            return roi_align(self.image[None], F.pad(rois, (1, 0)), self.size)
        step = max(1, WHOLE // (self.image.numel() * self.image.element_size()))
        regions = []
        for part in slices(len(rois), step):
            images = self._blend(self.image[None], self.masks[source[part], None])
            index = torch.arange(len(images)).to(rois)
            regions.append(roi_align(images, torch.cat([index[:, None], rois[part]], dim=1), self.size))
        return torch.cat(regions)

    def _stretch(self, source: Tensor) -> Tensor:
        size = (self.size, self.size)
        image = F.interpolate(self.image[None], size, mode="bilinear", align_corners=False)
        if not self.rule.masked:
            return image.repeat(len(source), 1, 1, 1)
        masks = self.masks[source, None].to(image.dtype)
        return self._blend(image, F.interpolate(masks, size, mode="bilinear", align_corners=False))


def crop_masks(
    image: Tensor,
    masks: Tensor,
    rule: str | CropRule,
    *,
    size: int,
    pixel_mean: Sequence[float],
    pixel_std: Sequence[float],
) -> MaskCrops:
    """Crop one image with each distinct mask.

    Args:
        image: (3, h, w) RGB, 0 .. 255, uint8 or float.
        masks: (Q, H, W) with H >= h and W >= w: bool, or values that the rule's threshold applies to. The
            image is padded to their size, right and below, with the mean colour.
        rule: A `CropRule` or its name.
        size: Side of the crops in pixels, CLIP's image size.
        pixel_mean: CLIP's mean of each channel, RGB, for images in 0 .. 1.
        pixel_std: CLIP's standard deviation of each channel.

    Raises:
        ValueError: If the masks are smaller than the image, or the rule is unknown.
    """
    rule = get_crop_rule(rule)
    below, right = (m - i for m, i in zip(masks.shape[-2:], image.shape[-2:], strict=True))
    if below < 0 or right < 0:
        raise ValueError(f"masks {tuple(masks.shape)} are smaller than the image {tuple(image.shape)}")
    dtype = image.dtype if image.is_floating_point() else torch.float32
    mean, std = (
        torch.tensor(s, device=image.device, dtype=dtype).reshape(3, 1, 1) for s in (pixel_mean, pixel_std)
    )
    normalised = F.pad((image - 255 * mean) / (255 * std), (0, right, 0, below))
    extent = mask_extent(masks, rule.threshold)
    whole = extent.boxes.new_tensor([0, 0, masks.shape[2], masks.shape[1]])
    cropped = extent.valid[:, None] & (rule.sampling != "stretch")
    boxes = torch.where(cropped, extent.boxes, whole)
    valid = torch.ones_like(extent.valid) if rule.keep_empty else extent.valid
    kept = valid.nonzero().squeeze(1)
    source, index = _distinct(masks, kept, torch.cat([extent.columns, extent.rows], dim=1), rule)
    return MaskCrops(
        rule=rule,
        valid=valid,
        index=index,
        boxes=expand_boxes(boxes[source], rule.expand, masks.shape[-2:]),
        source=source,
        image=normalised,
        masks=masks,
        fill=torch.zeros_like(mean) if rule.fill == "mean" else -mean / std,
        size=size,
    )


def _distinct(masks: Tensor, kept: Tensor, signature: Tensor, rule: CropRule) -> tuple[Tensor, Tensor]:
    """Find the first of each set of equal masks, and which of these (V,) represents each kept mask.

    Only masks with equal signatures (the rows and columns that they occupy) are compared pixel by pixel.
    """
    first = torch.arange(len(kept), device=kept.device)
    if len(kept):
        _, group, count = torch.unique(signature[kept].byte(), dim=0, return_inverse=True, return_counts=True)
        alike = (count[group] > 1).nonzero().squeeze(1)
        if len(alike):
            pixels = masks[kept[alike]]
            by_value = rule.soft or rule.sampling == "stretch"
            pixels = pixels if by_value else (pixels > rule.threshold).byte()
            _, equal = torch.unique(pixels.flatten(1), dim=0, return_inverse=True)
            leader = torch.full_like(equal, len(kept)).scatter_reduce(0, equal, alike, "amin")
            first[alike] = leader[equal]
    leaders, index = torch.unique(first, return_inverse=True)
    return kept[leaders], index


def expand_boxes(boxes: Tensor, factor: float, size: Sequence[int] | Tensor) -> Tensor:
    """Scale boxes about their centres; truncate corners to whole pixels and clip them to the image (h, w)."""
    if factor == 1:
        return boxes
    low, high = boxes[:, :2].double(), boxes[:, 2:].double()
    centre, half = (low + high) / 2, factor * (high - low) / 2
    limit = torch.as_tensor(size, device=boxes.device, dtype=boxes.dtype).flip(0)
    start = (centre - half).trunc().long().clamp(min=0)
    end = torch.minimum((centre + half).trunc().long(), limit)
    return torch.cat([start, torch.maximum(end, start + 1)], dim=1)


def _nearest(start: Tensor, end: Tensor, size: int) -> Tensor:
    """Find the pixels (n, size) that `F.interpolate(mode="nearest")` takes from start .. end."""
    span = end - start
    scale = (span / size)[:, None]
    offset = (torch.arange(size, device=start.device) * scale).floor().long()
    return start[:, None] + torch.minimum(offset, span[:, None] - 1)


def _taps(start: Tensor, end: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Find the taps (n, size, 4) and weights of bicubic resizing of start .. end, in float32 and with
    a = -0.75 as `F.interpolate`. Taps beyond an end move to it.
    """
    a, span = -0.75, end - start
    position = (torch.arange(size, device=start.device) + 0.5) * (span / size)[:, None] - 0.5
    left = position.floor()
    t = position - left

    def near(x: Tensor) -> Tensor:  # |x| <= 1
        return ((a + 2) * x - (a + 3)) * x * x + 1

    def far(x: Tensor) -> Tensor:  # 1 < |x| < 2
        return ((a * x - 5 * a) * x + 8 * a) * x - 4 * a

    weights = torch.stack([far(t + 1), near(t), near(1 - t), far(2 - t)], dim=2)
    offsets = left.long()[:, :, None] + torch.arange(-1, 3, device=start.device)
    offsets = torch.minimum(offsets.clamp(min=0), (span - 1)[:, None, None])
    return start[:, None, None] + offsets, weights
