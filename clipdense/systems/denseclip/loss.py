"""The auxiliary pixel-text loss (Rao et al., DenseCLIP, CVPR 2022, section 3.4)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from fvcore.nn import sigmoid_focal_loss
from torch import Tensor, nn

from clipdense.clip.image_prompts import alignment_loss

from detectron2.config import CfgNode, configurable
from detectron2.structures import BitMasks, Instances, PolygonMasks

__all__ = [
    "STRIDE",
    "Average",
    "PixelTextLoss",
    "binary_loss",
    "box_targets",
    "focal_loss",
    "mask_targets",
    "pixel_cross_entropy",
    "softmax_loss",
]

STRIDE = 4
"""Stride, in pixels, of the targets that are computed from boxes and masks."""

SOURCES = ("boxes", "masks", "sem_seg")

Average = Literal["labelled", "all"]
"""The pixels that a cross-entropy is averaged over; of all, ignored ones add 0."""

LOSSES = ("bce", "focal", "ce")


class PixelTextLoss(nn.Module):
    """Classification of the pixels of a score map s by text.

    With boxes (as published) or instance masks: binary cross-entropy of sigmoid(s) over the K classes, at the
    pixels inside any box. A pixel belongs to every class whose box, or mask, covers it. With a semantic map:
    cross-entropy of softmax(s).

    Not published: softmax cross-entropy or a focal loss for boxes and masks, and a bias, s + b, inside the
    loss. CLIP's cosines lie in a narrow cone around a positive value, so that s / tau starts far above the
    logit of rare positives; the bias takes that offset instead of the trunk.

    Attributes:
        bias: b; a parameter if it is learned.
    """

    @configurable
    def __init__(
        self,
        source: str = "boxes",
        weight: float = 1.0,
        ignore_label: int = 255,
        loss: str = "bce",
        bias: float = 0.0,
        learn_bias: bool = False,
        average: Average = "labelled",
        alignment_weight: float = 0.0,
    ) -> None:
        """
        Args:
            source: what the targets are computed from: "boxes", "masks" or "sem_seg".
            weight: factor of the loss.
            ignore_label: label of semantic maps that is left out.
            loss: "bce", "focal" or "ce", for boxes and masks.
            bias: initial b, for bce and focal.
            learn_bias: whether b is learned.
            average: for semantic maps: the pixels that the loss is averaged over.
            alignment_weight: for semantic maps: factor of `alignment_loss` (ICPC, experimental), which is
                added to the cross-entropy.

        Raises:
            ValueError: If the source or the loss is unknown, a bias is set for a softmax, which it does not
                change, or the alignment is set for another source than semantic maps.
        """
        super().__init__()
        if source not in SOURCES:
            raise ValueError(f"MODEL.PIXEL_TEXT.SOURCE must be one of {', '.join(SOURCES)}, not {source!r}")
        if loss not in LOSSES:
            raise ValueError(f"MODEL.PIXEL_TEXT.LOSS must be one of {', '.join(LOSSES)}, not {loss!r}")
        if (bias or learn_bias) and (loss == "ce" or source == "sem_seg"):
            raise ValueError(
                "MODEL.PIXEL_TEXT.BIAS and LEARN_BIAS have no effect on softmax cross-entropy: set BIAS 0 "
                "and LEARN_BIAS False, or LOSS bce or focal"
            )
        if alignment_weight and source != "sem_seg":
            raise ValueError(
                f"MODEL.PIXEL_TEXT.ALIGNMENT_WEIGHT {alignment_weight} needs SOURCE sem_seg, not {source}"
            )
        check_average(average)
        self.source, self.weight, self.ignore_label, self.loss = source, weight, ignore_label, loss
        self.average, self.alignment_weight = average, alignment_weight
        self.bias = nn.Parameter(torch.tensor(float(bias))) if learn_bias else float(bias)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        keys = cfg.MODEL.PIXEL_TEXT
        return {
            "source": keys.SOURCE,
            "weight": keys.WEIGHT,
            "ignore_label": cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE,
            "loss": keys.LOSS,
            "bias": keys.BIAS,
            "learn_bias": keys.LEARN_BIAS,
            "average": cfg.MODEL.SEM_SEG_HEAD.LOSS_AVERAGE,
            "alignment_weight": keys.ALIGNMENT_WEIGHT,
        }

    def forward(
        self, score: Tensor, inputs: Sequence[dict[str, Any]], padded_size: tuple[int, int]
    ) -> Tensor:
        """Compute the weighted loss.

        Args:
            score: s (B, K, h, w), logits.
            inputs: Detectron2's inputs, with "instances" or "sem_seg".
            padded_size: (H, W) of the batch in pixels.

        Returns:
            A scalar; 0 if no box covers a pixel, or no pixel is labelled.

        Raises:
            KeyError: If an input lacks the source.
        """
        key = "sem_seg" if self.source == "sem_seg" else "instances"
        for x in inputs:
            if key not in x:
                raise KeyError(
                    f"{x.get('file_name', 'an image')} has no {key!r} for the pixel-text loss: set another "
                    "MODEL.PIXEL_TEXT.SOURCE"
                )
        if self.source == "sem_seg":
            return self.weight * self._semantic_loss(score, [x["sem_seg"] for x in inputs], padded_size)
        make_targets = box_targets if self.source == "boxes" else mask_targets
        instances = [x["instances"] for x in inputs]
        targets, inside = make_targets(instances, score.shape[1], padded_size, score.device)
        score = F.interpolate(score, size=targets.shape[-2:], mode="bilinear", align_corners=False)
        if self.loss == "ce":
            return self.weight * softmax_loss(score, targets)
        pixel_loss = binary_loss if self.loss == "bce" else focal_loss
        return self.weight * pixel_loss(score + self.bias, targets, inside)

    def _semantic_loss(self, score: Tensor, labels: Sequence[Tensor], padded_size: tuple[int, int]) -> Tensor:
        """Compute the mean cross-entropy over the pixels of maps (H_i, W_i), padded to one size."""
        padded = [
            F.pad(
                x.to(score.device).long(),
                (0, padded_size[1] - x.shape[1], 0, padded_size[0] - x.shape[0]),
                value=self.ignore_label,
            )
            for x in labels
        ]
        target = torch.stack(padded)
        loss = pixel_cross_entropy(score, target, self.ignore_label, self.average)
        if not self.alignment_weight:
            return loss
        cells = F.interpolate(target[:, None].float(), size=score.shape[-2:], mode="nearest").flatten(1)
        alignment = alignment_loss(score.flatten(2), cells.long(), self.ignore_label)
        return loss + self.alignment_weight * alignment


def check_average(average: str) -> None:
    """Raise ValueError if ``average`` is not one of `Average`."""
    if average not in get_args(Average):
        raise ValueError(
            f"MODEL.SEM_SEG_HEAD.LOSS_AVERAGE must be one of {', '.join(get_args(Average))}, not {average!r}"
        )


def pixel_cross_entropy(
    logits: Tensor, target: Tensor, ignore_label: int, average: Average = "labelled"
) -> Tensor:
    """Compute the mean cross-entropy over pixels.

    Args:
        logits: (B, K, h, w), which are resized bilinearly to the target.
        target: labels (B, H, W), int64.
        ignore_label: label of pixels that have no loss.
        average: "labelled": the mean over the pixels with a label; "all": over all pixels, padding included
            (mmsegmentation 0.19, so the published segmentors): a crop with many ignored pixels counts less.

    Returns:
        A scalar; 0 if no pixel is labelled.
    """
    logits = F.interpolate(logits.float(), size=target.shape[-2:], mode="bilinear", align_corners=False)
    loss = F.cross_entropy(logits, target, ignore_index=ignore_label, reduction="sum")
    count = (target != ignore_label).sum() if average == "labelled" else target.new_tensor(target.numel())
    return loss / count.clamp(min=1)


def binary_loss(score: Tensor, targets: Tensor, inside: Tensor) -> Tensor:
    """Compute the mean binary cross-entropy over the inside pixels and all classes.

    Args:
        score: logits (B, K, h, w).
        targets: (B, K, h, w) bool.
        inside: (B, 1, h, w) bool.

    Returns:
        A scalar; 0 if no pixel is inside.
    """
    loss = F.binary_cross_entropy_with_logits(score.float(), targets.float(), reduction="none")
    return (loss * inside).sum() / (inside.sum() * score.shape[1]).clamp(min=1)


def focal_loss(score: Tensor, targets: Tensor, inside: Tensor) -> Tensor:
    """Compute the sigmoid focal loss (Lin et al., ICCV 2017; alpha 0.25, gamma 2) over the inside pixels.

    Arguments as of `binary_loss`.

    Returns:
        The sum, divided by the number of positive pairs of pixel and class, at least 1.
    """
    loss = sigmoid_focal_loss(score.float(), targets.float(), alpha=0.25, gamma=2.0)
    return (loss * inside).sum() / (targets & inside).sum().clamp(min=1)


def softmax_loss(score: Tensor, targets: Tensor) -> Tensor:
    """Compute the mean softmax cross-entropy over the pixels that have a class.

    A pixel of several classes has each of them with equal probability.

    Args:
        score: logits (B, K, h, w).
        targets: (B, K, h, w) bool.

    Returns:
        A scalar; 0 if no pixel has a class.
    """
    probability = targets.float()
    number = probability.sum(1)
    loss = -(probability * score.float().log_softmax(1)).sum(1) / number.clamp(min=1)
    return loss.sum() / (number > 0).sum().clamp(min=1)


def box_targets(
    instances: Sequence[Instances], num_classes: int, padded_size: tuple[int, int], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Compute per-pixel targets from boxes, by the rule of the published detectors.

    Corners are divided by the stride, truncated to integers and clamped to the map. The far corner is
    exclusive, so the last row and column are never covered, and a box smaller than a cell may cover nothing.

    Args:
        instances: one per image, with gt_boxes in pixels and gt_classes in 0 .. K - 1.
        num_classes: K.
        padded_size: (H, W) of the batch in pixels.
        device: device of the results.

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
        in_columns, in_rows = (columns >= x1) & (columns < x2), (rows >= y1) & (rows < y2)
        covered = in_rows[:, :, None] & in_columns[:, None, :]
        results.append(
            (_union_by_class(covered, image.gt_classes, num_classes), covered.any(0, keepdim=True))
        )
    targets, inside = zip(*results, strict=True)
    return torch.stack(targets), torch.stack(inside)


def mask_targets(
    instances: Sequence[Instances], num_classes: int, padded_size: tuple[int, int], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Compute per-pixel targets from instance masks.

    Arguments and return value are those of `box_targets`. A cell belongs to a class if a mask of the class
    covers at least half of it. Cells inside a box but outside its mask become negatives. Cells inside the box
    of an object without a mask (``gt_has_mask`` False) are not inside.

    Raises:
        KeyError: If instances have no gt_masks.
    """
    _, inside = box_targets(instances, num_classes, padded_size, device)
    if any(image.has("gt_has_mask") for image in instances):
        unknown = [
            image[~image.gt_has_mask] if image.has("gt_has_mask") else image[:0] for image in instances
        ]
        inside = inside & ~box_targets(unknown, num_classes, padded_size, device)[1]
    size = (inside.shape[2], inside.shape[3])
    targets = []
    for image in instances:
        if not image.has("gt_masks"):
            raise KeyError(
                "instances have no masks, which MODEL.PIXEL_TEXT.SOURCE masks needs: set MODEL.MASK_ON True"
            )
        masks = image.gt_masks
        if isinstance(masks, PolygonMasks):
            masks = BitMasks.from_polygon_masks(masks, *image.image_size)
        whole = masks.tensor.new_zeros((len(masks), size[0] * STRIDE, size[1] * STRIDE), device=device)
        height, width = (min(a, b) for a, b in zip(masks.tensor.shape[1:], whole.shape[1:], strict=True))
        whole[:, :height, :width] = masks.tensor[:, :height, :width]
        covered = F.avg_pool2d(whole[:, None].float(), STRIDE)[:, 0] >= 0.5
        targets.append(_union_by_class(covered, image.gt_classes, num_classes))
    return torch.stack(targets), inside


def _union_by_class(covered: Tensor, classes: Tensor, num_classes: int) -> Tensor:
    """Unite the maps (n, h, w) of each class -> (K, h, w)."""
    members = F.one_hot(classes.to(covered.device), num_classes).T.float()
    return (members @ covered.flatten(1).float() > 0).unflatten(1, covered.shape[1:])
