"""The auxiliary pixel-text loss (Rao et al., DenseCLIP, CVPR 2022, section 3.4)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detectron2.structures import BitMasks, Instances, PolygonMasks

__all__ = ["STRIDE", "PixelTextLoss", "box_targets", "mask_targets"]

STRIDE = 4
"""Targets from boxes and masks are made at this stride, in pixels."""

SOURCES = ("boxes", "masks", "sem_seg")


class PixelTextLoss(nn.Module):
    """Classifies the pixels of a score map s by text.

    From boxes, as published, and from instance masks: binary cross-entropy of sigmoid(s) over the K classes
    at the pixels inside any box; a pixel is of every class that has a box, or a mask, over it. From a
    semantic map: cross-entropy of softmax(s).
    """

    def __init__(self, source: str = "boxes", weight: float = 1.0, ignore_label: int = 255) -> None:
        """
        Args:
            source: "boxes", "masks" or "sem_seg".
            weight: of the loss.
            ignore_label: of semantic maps.

        Raises:
            ValueError: another source.
        """
        super().__init__()
        if source not in SOURCES:
            raise ValueError(f"MODEL.PIXEL_TEXT.SOURCE must be one of {', '.join(SOURCES)}, not {source!r}")
        self.source, self.weight, self.ignore_label = source, weight, ignore_label

    def forward(
        self, score: Tensor, inputs: Sequence[dict[str, Any]], padded_size: tuple[int, int]
    ) -> Tensor:
        """The weighted loss, a scalar; 0 where a batch shows no box or no labelled pixel.

        Args:
            score: s (B, K, h, w).
            inputs: Detectron2's, with "instances" or "sem_seg".
            padded_size: (H, W) of the batch in pixels.

        Raises:
            KeyError: an input without the source.
        """
        key = "sem_seg" if self.source == "sem_seg" else "instances"
        for x in inputs:
            if key not in x:
                raise KeyError(
                    f"{x.get('file_name', 'an image')} has no {key!r} for the pixel-text loss: set another "
                    "MODEL.PIXEL_TEXT.SOURCE"
                )
        if self.source == "sem_seg":
            return self.weight * self._semantic(score, [x["sem_seg"] for x in inputs], padded_size)
        make = box_targets if self.source == "boxes" else mask_targets
        targets, inside = make([x["instances"] for x in inputs], score.shape[1], padded_size, score.device)
        score = F.interpolate(score, size=targets.shape[-2:], mode="bilinear", align_corners=False)
        return self.weight * binary_loss(score, targets, inside)

    def _semantic(self, score: Tensor, labels: Sequence[Tensor], padded_size: tuple[int, int]) -> Tensor:
        padded = [
            F.pad(
                x.to(score.device).long(),
                (0, padded_size[1] - x.shape[1], 0, padded_size[0] - x.shape[0]),
                value=self.ignore_label,
            )
            for x in labels
        ]
        target = torch.stack(padded)
        score = F.interpolate(score, size=padded_size, mode="bilinear", align_corners=False)
        loss = F.cross_entropy(score.float(), target, ignore_index=self.ignore_label, reduction="sum")
        return loss / (target != self.ignore_label).sum().clamp(min=1)


def binary_loss(score: Tensor, targets: Tensor, inside: Tensor) -> Tensor:
    """Mean binary cross-entropy over the pixels inside and all classes; 0 where no pixel is.

    Args:
        score: logits (B, K, h, w).
        targets: (B, K, h, w) bool.
        inside: (B, 1, h, w) bool.
    """
    loss = F.binary_cross_entropy_with_logits(score.float(), targets.float(), reduction="none")
    return (loss * inside).sum() / (inside.sum() * score.shape[1]).clamp(min=1)


def box_targets(
    instances: Sequence[Instances], num_classes: int, padded_size: tuple[int, int], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Targets from boxes (specs/denseclip_maskclip_segclip.md 1.11).

    Corners are divided by the stride and cut to whole numbers within the map; the far ones are exclusive, so
    the last row and column are never covered, and a box under one cell may vanish.

    Args:
        instances: of each image, with gt_boxes in pixels and gt_classes 0 .. K - 1.
        num_classes: K.
        padded_size: (H, W) of the batch in pixels.
        device: of the results.

    Returns:
        targets (B, K, h, w) and inside (B, 1, h, w), bool, with h = floor(H / 4), w = floor(W / 4).
    """
    h, w = padded_size[0] // STRIDE, padded_size[1] // STRIDE
    rows, columns = torch.arange(h, device=device), torch.arange(w, device=device)
    results = []
    for image in instances:
        boxes = (image.gt_boxes.tensor.to(device) / STRIDE).long()
        x1, x2 = boxes[:, 0::2].clamp(0, w - 1).T[..., None]
        y1, y2 = boxes[:, 1::2].clamp(0, h - 1).T[..., None]
        across, down = (columns >= x1) & (columns < x2), (rows >= y1) & (rows < y2)
        covered = down[:, :, None] & across[:, None, :]
        results.append((_by_class(covered, image.gt_classes, num_classes), covered.any(0, keepdim=True)))
    targets, inside = zip(*results, strict=True)
    return torch.stack(targets), torch.stack(inside)


def mask_targets(
    instances: Sequence[Instances], num_classes: int, padded_size: tuple[int, int], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Targets from instance masks: as `box_targets`, but a class holds only where half of a cell is mask.

    What a box covers beside its mask thereby becomes a negative.

    Raises:
        KeyError: instances without gt_masks.
    """
    _, inside = box_targets(instances, num_classes, padded_size, device)
    size = (inside.shape[2], inside.shape[3])
    targets = []
    for image in instances:
        if not image.has("gt_masks"):
            raise KeyError("no instance masks for MODEL.PIXEL_TEXT.SOURCE masks: set MODEL.MASK_ON True")
        masks = image.gt_masks
        if isinstance(masks, PolygonMasks):
            masks = BitMasks.from_polygon_masks(masks, *image.image_size)
        whole = masks.tensor.new_zeros((len(masks), size[0] * STRIDE, size[1] * STRIDE), device=device)
        height, width = (min(a, b) for a, b in zip(masks.tensor.shape[1:], whole.shape[1:], strict=True))
        whole[:, :height, :width] = masks.tensor[:, :height, :width]
        covered = F.avg_pool2d(whole[:, None].float(), STRIDE)[:, 0] >= 0.5
        targets.append(_by_class(covered, image.gt_classes, num_classes))
    return torch.stack(targets), inside


def _by_class(covered: Tensor, classes: Tensor, num_classes: int) -> Tensor:
    """Union of the maps (n, h, w) of each class -> (K, h, w)."""
    members = F.one_hot(classes.to(covered.device), num_classes).T.float()
    return (members @ covered.flatten(1).float() > 0).unflatten(1, covered.shape[1:])
