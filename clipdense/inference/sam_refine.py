"""Refinement of a coarse segmentation by a promptable segmenter (SAM)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import scipy.ndimage
import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["MaskDecoder", "Prompts", "RefineSettings", "prompts_of_class", "refine_by_prompts"]

MASK_SIDE = 256
"""Side of SAM's low-resolution masks."""


@dataclass(frozen=True)
class Prompts:
    """Prompts of one class, in pixels of the segmenter's input frame.

    Attributes:
        points: (n, 1, 2) x and y, the pixel of each region with the largest score.
        point_labels: (n, 1) ones.
        boxes: (n, 4) x min, y min, x max, y max.
        mask_input: (1, 256, 256), the class's score map.
        regions: (n, h, w) bool, the regions at the reduced size.
    """

    points: Tensor
    point_labels: Tensor
    boxes: Tensor
    mask_input: Tensor
    regions: Tensor


MaskDecoder = Callable[[Prompts], tuple[Tensor, Tensor]]
"""From the prompts of one class to mask logits (n, 256, 256) and predicted IoUs (n,)."""


@dataclass(frozen=True)
class RefineSettings:
    """Settings of `refine_by_prompts`.

    Attributes:
        coarse_threshold: pixels whose best score is lower belong to no region; 0: all belong to one.
        minimal_area: least number of (reduced) pixels of a region.
        iou_threshold: answers with a predicted IoU up to it are left out.
        mask_factor: factor of the scores in the mask prompt.
        downsample: regions are found at 1 / downsample of the image's size.
        frame: longest side of the segmenter's input in pixels.
    """

    coarse_threshold: float = 0.2
    minimal_area: int = 225
    iou_threshold: float = 0.9
    mask_factor: float = 0.005
    downsample: int = 2
    frame: int = 1024


def scaled_size(height: int, width: int, longest: int) -> tuple[int, int]:
    """Scale a size so that its longest side is ``longest``; sides are rounded as SAM does."""
    factor = longest / max(height, width)
    return int(height * factor + 0.5), int(width * factor + 0.5)


def _reduced(labels: Tensor, scores: Tensor, settings: RefineSettings) -> tuple[Tensor, Tensor]:
    """Reduce labels and scores; labels of pixels below the threshold become -1."""
    height, width = labels.shape
    size = height // settings.downsample, width // settings.downsample
    small = F.interpolate(labels[None, None].float(), size, mode="nearest")[0, 0].long()
    maps = F.interpolate(scores[None], size, mode="bilinear", align_corners=False)[0]
    if settings.coarse_threshold > 0:
        small = small.masked_fill(maps.amax(0) < settings.coarse_threshold, -1)
    return small, maps


def prompts_of_class(
    mask: Tensor, scores: Tensor, size: tuple[int, int], settings: RefineSettings
) -> Prompts | None:
    """Make the prompts of the connected regions of one class; None without a large enough region.

    Args:
        mask: (h, w) bool, reduced, the pixels of the class.
        scores: (h, w), reduced, the scores of the class.
        size: height and width of the image.
        settings: see the class.
    """
    found, count = scipy.ndimage.label(mask.cpu().numpy(), structure=np.ones((3, 3)))
    areas = np.bincount(found.ravel(), minlength=count + 1)
    kept = [i for i in range(1, count + 1) if areas[i] >= settings.minimal_area]
    if not kept:
        return None
    regions = torch.stack([torch.from_numpy(found == i) for i in kept]).to(mask.device)
    h, w = mask.shape
    down, across = (a / b for a, b in zip(scaled_size(h, w, settings.frame), (h, w), strict=True))
    best = scores.masked_fill(~regions, -torch.inf).flatten(1).argmax(1)
    points = torch.stack([best % w * across, best // w * down], 1)
    boxes = []
    for region in regions:
        ys, xs = region.any(1).nonzero()[:, 0], region.any(0).nonzero()[:, 0]
        boxes.append(torch.stack([xs[0] * across, ys[0] * down, xs[-1] * across, ys[-1] * down]))
    return Prompts(
        points.float()[:, None],
        points.new_ones(len(points), 1),
        torch.stack(boxes).float(),
        _mask_prompt(scores, size, settings),
        regions,
    )


def _mask_prompt(scores: Tensor, size: tuple[int, int], settings: RefineSettings) -> Tensor:
    height, width = scaled_size(*size, MASK_SIDE)
    low = F.interpolate(scores[None, None], (height, width), mode="bilinear", align_corners=False)[0]
    low = F.pad(low, (0, MASK_SIDE - width, 0, MASK_SIDE - height))
    return torch.where(low > settings.coarse_threshold, low * settings.mask_factor, 0)


def _full_size(logits: Tensor, size: tuple[int, int], frame: int) -> Tensor:
    """Enlarge mask logits (n, 256, 256) to the frame, remove its padding, and resize them to the image."""
    large = F.interpolate(logits[:, None], (frame, frame), mode="bilinear", align_corners=False)
    height, width = scaled_size(*size, frame)
    cut = large[..., :height, :width]
    return F.interpolate(cut, size, mode="bilinear", align_corners=False)[:, 0]


def _class_prompts(labels: Tensor, scores: Tensor, settings: RefineSettings) -> Iterator[tuple[int, Prompts]]:
    """Yield the classes that have a region, in order, and their prompts."""
    small, maps = _reduced(labels, scores, settings)
    for c in range(len(scores)):
        if maps[c].max() < settings.coarse_threshold:
            continue
        prompts = prompts_of_class(small == c, maps[c], (labels.shape[0], labels.shape[1]), settings)
        if prompts is not None:
            yield c, prompts


def refine_by_prompts(
    labels: Tensor, scores: Tensor, decode: MaskDecoder, settings: RefineSettings
) -> tuple[Tensor, Tensor]:
    """Ask a segmenter for the masks of the coarse regions, and let them decide the labels.

    A class's map is, inside the union of its valid masks, the largest product of mask probability and class
    score. Labels are the arg-max of these maps; a pixel in none of them keeps its label. Regions without a
    valid answer keep their scores in the maps that are returned, but not in the decision.

    Args:
        labels: (H, W) int64.
        scores: (K, H, W) in 0..1.
        decode: the segmenter, called once per class that has a region, in the order of the classes.
        settings: see the class.

    Returns:
        Labels (H, W) and class maps (K, H, W); unchanged if there is no valid answer.

    Source: Trident (Shi et al., ICCV 2025), section 3.4.
    """
    size = (labels.shape[0], labels.shape[1])
    refined, valid_answers = torch.zeros_like(scores), False
    failed: Tensor | None = None
    for c, prompts in _class_prompts(labels, scores, settings):
        logits, iou = decode(prompts)
        valid = iou > settings.iou_threshold
        if bool(valid.any()):
            valid_answers = True
            answers = _full_size(logits[valid], size, settings.frame)
            product = (answers.sigmoid() * scores[c]).amax(0)
            refined[c] = product * (answers > 0).any(0)
        if not bool(valid.all()):
            rest = prompts.regions[~valid].any(0)
            failed = rest if failed is None else failed | rest
    if not valid_answers:
        return labels, scores
    decided = refined.amax(0) > 0
    labels = torch.where(decided, refined.argmax(0), labels)
    if failed is not None:
        inside = F.interpolate(failed[None, None].float(), size, mode="nearest")[0]
        refined = torch.maximum(refined, inside * scores)
    return labels, refined
