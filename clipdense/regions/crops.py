"""Masked crops for a CLIP tower: what two-stage systems hand to CLIP for each mask proposal.

The crop rules of OVSeg, zsseg and ZegFormer are settings of one `CropRule`
(specs/ovseg_zegformer_maskformer.md 2.3, 3, 4). Masks that are empty, or equal to another one, are not
cropped twice: `MaskCrops` says which crop belongs to which mask.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import roi_align

__all__ = ["CROP_RULES", "CropRule", "MaskCrops", "crop_masks", "get_crop_rule", "mask_boxes"]


@dataclass(frozen=True)
class CropRule:
    """How a mask becomes an image for CLIP. The aspect ratio is never kept.

    Attributes:
        threshold: a pixel is inside where the mask is greater.
        sampling: "bicubic" resizes the tight box, ends exclusive, with taps that stay in it (no antialias);
            "roi_align" averages over the box whose ends are the last pixels inside, and takes the whole image
            where that has no area (ZegFormer); "stretch" takes the whole image always, and interpolates the
            mask before the threshold (ZegFormer's "mask").
        masked: paint what is outside the mask with the fill.
        fill: "mean" of CLIP's pixels, or "zero" (black).
        expand: the box grows by it, at least 1, about its centre, cut to whole pixels and to the image.
        soft: blend with the mask's values instead of its pixels above the threshold ("matting").
        keep_empty: empty masks get a crop, too, of the whole image.
        padded_logits: what the rule is made for: mask logits of the padded image (ZegFormer), rather than
            probabilities of the image.

    Raises:
        ValueError: an unknown sampling or fill, a factor below 1, or what only "bicubic" has with another
            sampling.
    """

    threshold: float = 0.5
    sampling: str = "bicubic"
    masked: bool = True
    fill: str = "mean"
    expand: float = 1.0
    soft: bool = False
    keep_empty: bool = False
    padded_logits: bool = False

    @classmethod
    def from_config(cls, node: Mapping[str, Any]) -> CropRule:
        """Build the rule from a config node whose keys are this class's attributes in capitals."""
        return cls(**{key.lower(): value for key, value in node.items()})

    def __post_init__(self) -> None:
        if self.sampling not in ("bicubic", "roi_align", "stretch"):
            raise ValueError(f"sampling must be bicubic, roi_align or stretch, not '{self.sampling}'")
        if self.fill not in ("mean", "zero"):
            raise ValueError(f"fill must be mean or zero, not '{self.fill}'")
        if self.expand < 1:
            raise ValueError(f"boxes grow by a factor of at least 1, not {self.expand}")
        if self.sampling != "bicubic" and (self.fill, self.expand, self.soft) != ("mean", 1.0, False):
            raise ValueError(f"only bicubic crops have another fill, expansion or soft masks: {self}")


CROP_RULES: dict[str, CropRule] = {
    "ovseg": CropRule(threshold=0.4),
    "zsseg": CropRule(),
    "zegformer_cropmask": CropRule(0.0, "roi_align", keep_empty=True, padded_logits=True),
    "zegformer_crop": CropRule(0.0, "roi_align", masked=False, keep_empty=True, padded_logits=True),
    "zegformer_mask": CropRule(0.0, "stretch", keep_empty=True, padded_logits=True),
}


def get_crop_rule(rule: str | CropRule) -> CropRule:
    """A rule by name. Raises ValueError for an unknown one."""
    if isinstance(rule, CropRule):
        return rule
    if rule not in CROP_RULES:
        raise ValueError(f"unknown crop rule '{rule}'; known: {', '.join(CROP_RULES)}")
    return CROP_RULES[rule]


def mask_boxes(masks: Tensor, threshold: float = 0.5) -> tuple[Tensor, Tensor]:
    """Tight boxes of the pixels above a threshold.

    Args:
        masks: (Q, H, W), bool or any values.

    Returns:
        (Q, 4) int64 xyxy, ends exclusive, all zero for an empty mask; (Q,) bool, which masks are not empty.
    """
    boxes, columns, _ = _projections(masks, threshold)
    return boxes, columns.any(1)


@dataclass(frozen=True)
class MaskCrops:
    """The crops of one image's masks; their pixels are made when they are asked for.

    Attributes:
        valid: (Q,) bool, the masks that have a crop.
        index: (V,) int64, the crop of each valid mask, in their order; equal masks share one.
        boxes: (N, 4) int64 xyxy, ends exclusive, what each crop shows.
        source: (N,) int64, the mask that each crop is of.
        image: (3, H, W), normalised with CLIP's statistics, padded with their mean.
        masks: (Q, H, W).
        fill: (3, 1, 1), the normalised colour outside of masks.
        size: side of the crops.
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
        """Slices of at most `size` crops, to make and encode one after the other."""
        for start in range(0, len(self), size):
            yield slice(start, start + size)

    def regions(self, part: slice = slice(None), *, together: bool | None = None) -> Tensor:
        """Normalised crops (n, 3, size, size).

        Args:
            part: which crops.
            together: bicubic crops in one batched operation. None: on accelerators, which wait for many small
                calls; on a CPU arithmetic bounds both, and one interpolation a crop does less of it.
        """
        boxes, source = self.boxes[part], self.source[part]
        if not len(source):
            return self.image.new_zeros(0, 3, self.size, self.size)
        if self.rule.sampling == "roi_align":
            return self._roi_align(boxes, source)
        if self.rule.sampling == "stretch":
            return self._stretch(source)
        if together is None:
            together = self.image.device.type != "cpu"
        return self._bicubic_together(boxes, source) if together else self._bicubic_each(boxes, source)

    def region_masks(self, part: slice = slice(None)) -> Tensor:
        """The masks in the crops' frames (n, 1, size, size), resized by nearest neighbour: 0 or 1, or the
        mask's values under a soft rule.
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

    def _bicubic_together(self, boxes: Tensor, source: Tensor) -> Tensor:
        """sum over the 4 x 4 taps of (image - fill) mask, each gathered for all crops at once; + fill."""
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
        rois[:, 2:] -= 1
        flat = (rois[:, 2:] <= rois[:, :2]).any(1)
        height, width = self.image.shape[1:]
        rois = torch.where(flat[:, None], rois.new_tensor([0, 0, width, height]), rois)
        images, index = self.image[None], rois.new_zeros(len(rois))
        if self.rule.masked:
            images, index = self._blend(images, self.masks[source, None]), torch.arange(len(rois)).to(rois)
        rois = torch.cat([index[:, None], rois], dim=1)
        regions: Tensor = roi_align(images, rois, self.size, 1.0, sampling_ratio=-1, aligned=True)
        return regions

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
    """Crops of one image, one for each different mask.

    Args:
        image: (3, h, w) RGB, 0 .. 255, uint8 or float.
        masks: (Q, H, W), H >= h and W >= w: bool, probabilities, or what the rule's threshold is for; the
            image is padded to their size, right and below, with the mean colour.
        rule: a `CropRule`, or its name.
        size: side of the crops in pixels: CLIP's image size.
        pixel_mean, pixel_std: CLIP's, RGB, of images in 0 .. 1.

    Raises:
        ValueError: masks smaller than the image, or an unknown rule.
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
    boxes, columns, rows = _projections(masks, rule.threshold)
    valid = columns.any(1)
    whole = boxes.new_tensor([0, 0, masks.shape[2], masks.shape[1]])
    boxes = whole.expand_as(boxes) if rule.sampling == "stretch" else boxes.where(valid[:, None], whole)
    if rule.keep_empty:
        valid = torch.ones_like(valid)
    kept = valid.nonzero().squeeze(1)
    source, index = _distinct(masks, kept, torch.cat([columns, rows], dim=1), rule)
    return MaskCrops(
        rule=rule,
        valid=valid,
        index=index,
        boxes=_expand(boxes[source], rule.expand, masks.shape[-2:]),
        source=source,
        image=normalised,
        masks=masks,
        fill=torch.zeros_like(mean) if rule.fill == "mean" else -mean / std,
        size=size,
    )


def _projections(masks: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes (Q, 4), and which columns (Q, W) and rows (Q, H) have a pixel inside."""
    columns, rows = masks.amax(1) > threshold, masks.amax(2) > threshold
    ends = []
    for inside in (columns, rows):
        flags = inside.byte()
        last = inside.shape[1] - flags.flip(1).argmax(1)
        ends.append((flags.argmax(1), last * inside.any(1)))
    (x0, x1), (y0, y1) = ends
    return torch.stack([x0, y0, x1, y1], dim=1), columns, rows


def _distinct(masks: Tensor, kept: Tensor, signature: Tensor, rule: CropRule) -> tuple[Tensor, Tensor]:
    """The first of every set of equal masks, and which of these (V,) stands for each kept mask.

    Only masks with the same projections are compared pixel by pixel.
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


def _expand(boxes: Tensor, factor: float, size: Sequence[int]) -> Tensor:
    """Boxes that grow about their centres; corners are truncated to whole pixels, then cut to the image."""
    if factor == 1:
        return boxes
    low, high = boxes[:, :2].double(), boxes[:, 2:].double()
    centre, half = (low + high) / 2, factor * (high - low) / 2
    limit = boxes.new_tensor([size[1], size[0]])
    corners = [(centre + sign * half).trunc().long().clamp(min=0) for sign in (-1, 1)]
    return torch.cat([torch.minimum(corner, limit) for corner in corners], dim=1)


def _nearest(start: Tensor, end: Tensor, size: int) -> Tensor:
    """The pixel (n, size) that nearest-neighbour resizing takes from start .. end, as `F.interpolate`."""
    span = end - start
    scale = (span / size)[:, None]
    offset = (torch.arange(size, device=start.device) * scale).floor().long()
    return start[:, None] + torch.minimum(offset, span[:, None] - 1)


def _taps(start: Tensor, end: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Pixels (n, size, 4) and weights of bicubic resizing of start .. end to `size`, a = -0.75, in float32
    as `F.interpolate`; taps beyond the ends stay at them.
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
