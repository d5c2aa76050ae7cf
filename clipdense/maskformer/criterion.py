"""Losses of mask classification."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from clipdense.maskformer.matcher import HungarianMatcher, Match
from clipdense.maskformer.points import sample_points, uncertain_points
from clipdense.maskformer.prediction import MaskPrediction, Targets

from detectron2.config import CfgNode, configurable
from detectron2.utils import comm

__all__ = ["SetCriterion", "dice_loss", "sigmoid_focal_loss"]


def sigmoid_focal_loss(logits: Tensor, masks: Tensor, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """Compute the focal loss (Lin et al., ICCV 2017), mean over pixels: logits (N, P), masks (N, P) in 0 .. 1
    -> (N,)."""
    p = logits.sigmoid()
    error = p * (1 - masks) + (1 - p) * masks
    weight = alpha * masks + (1 - alpha) * (1 - masks)
    entropy = F.binary_cross_entropy_with_logits(logits, masks, reduction="none")
    return (weight * error**gamma * entropy).mean(dim=1)


def dice_loss(logits: Tensor, masks: Tensor) -> Tensor:
    """Compute the dice loss (Milletari et al., V-Net, 3DV 2016): logits (N, P), masks (N, P) in 0 .. 1 ->
    (N,)."""
    p = logits.sigmoid()
    return 1 - (2 * (p * masks).sum(dim=1) + 1) / (p.sum(dim=1) + masks.sum(dim=1) + 1)


class SetCriterion(nn.Module):
    """Class loss of all queries and mask losses of the matched queries, after each layer.

    If `num_points` is above 0, the mask losses are cross entropy and dice loss on points where the masks are
    uncertain (Mask2Former, Cheng et al., CVPR 2022, section 3.3); otherwise focal and dice loss on all pixels
    of the ground truth (MaskFormer, Cheng et al., NeurIPS 2021, section 3.3).
    """

    empty_weight: Tensor | None

    @configurable
    def __init__(
        self,
        num_classes: int,
        matcher: HungarianMatcher,
        *,
        class_weight: float = 1.0,
        mask_weight: float = 20.0,
        dice_weight: float = 1.0,
        no_object_weight: float = 0.1,
        num_points: int = 0,
        oversample_ratio: float = 3.0,
        importance_ratio: float = 0.75,
    ) -> None:
        """
        Args:
            num_classes: K, without "no object".
            matcher: Assigns queries to ground-truth masks.
            class_weight: Weight of the class loss.
            mask_weight: Weight of the focal or cross-entropy loss.
            dice_weight: Weight of the dice loss.
            no_object_weight: Weight of "no object" in the class loss, where classes have 1; 0 ignores
                unmatched queries.
            num_points: Points per mask; 0: all pixels.
            oversample_ratio: See `uncertain_points`.
            importance_ratio: See `uncertain_points`.
        """
        super().__init__()
        self.num_classes = num_classes
        self.matcher = matcher
        self.weights = {"loss_ce": class_weight, "loss_mask": mask_weight, "loss_dice": dice_weight}
        self.sampling = num_points, oversample_ratio, importance_ratio
        weight = torch.ones(num_classes + 1)
        weight[-1] = no_object_weight
        self.register_buffer("empty_weight", weight if no_object_weight > 0 else None, persistent=False)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Read the constructor arguments from ``MODEL.MASK_FORMER`` and
        ``MODEL.SEM_SEG_HEAD.NUM_CLASSES``."""
        keys = cfg.MODEL.MASK_FORMER
        matcher = HungarianMatcher(
            cost_class=keys.CLASS_WEIGHT,
            cost_mask=keys.MASK_WEIGHT,
            cost_dice=keys.DICE_WEIGHT,
            num_points=keys.TRAIN_NUM_POINTS,
        )
        return {
            "num_classes": cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES,
            "matcher": matcher,
            "class_weight": keys.CLASS_WEIGHT,
            "mask_weight": keys.MASK_WEIGHT,
            "dice_weight": keys.DICE_WEIGHT,
            "no_object_weight": keys.NO_OBJECT_WEIGHT,
            "num_points": keys.TRAIN_NUM_POINTS,
            "oversample_ratio": keys.OVERSAMPLE_RATIO,
            "importance_ratio": keys.IMPORTANCE_SAMPLE_RATIO,
        }

    def forward(self, prediction: MaskPrediction, targets: Sequence[Targets]) -> dict[str, Tensor]:
        """Compute the weighted losses.

        Args:
            prediction: Of the network, with class logits.
            targets: Ground truth of each image; all masks have one size.

        Returns:
            ``loss_ce``, ``loss_mask`` and ``loss_dice``; with the suffix ``_i`` for the earlier layer i.
        """
        masks = torch.tensor(float(sum(len(t.labels) for t in targets)), device=prediction.mask_logits.device)
        if comm.get_world_size() > 1:
            dist.all_reduce(masks)
        num_masks = (masks / comm.get_world_size()).clamp(min=1)
        losses = self._losses(prediction, targets, num_masks)
        for i, earlier in enumerate(prediction.aux):
            losses |= {f"{k}_{i}": v for k, v in self._losses(earlier, targets, num_masks).items()}
        return losses

    def _losses(
        self, prediction: MaskPrediction, targets: Sequence[Targets], num_masks: Tensor
    ) -> dict[str, Tensor]:
        class_logits, mask_logits = prediction.require_class_logits(), prediction.mask_logits
        matches = self.matcher(class_logits, mask_logits, targets)
        with torch.autocast(mask_logits.device.type, enabled=False):
            loss_ce = self._class_loss(class_logits.float(), targets, matches)
            loss_mask, loss_dice = self._mask_losses(mask_logits, targets, matches)
        losses = {"loss_ce": loss_ce, "loss_mask": loss_mask / num_masks, "loss_dice": loss_dice / num_masks}
        return {name: self.weights[name] * loss for name, loss in losses.items()}

    def _class_loss(self, logits: Tensor, targets: Sequence[Targets], matches: Sequence[Match]) -> Tensor:
        labels = torch.full(logits.shape[:2], self.num_classes, device=logits.device)
        for row, target, (query, index) in zip(labels, targets, matches, strict=True):
            row[query.to(row.device)] = target.labels[index.to(row.device)]
        if self.empty_weight is None:
            return F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=self.num_classes)
        return F.cross_entropy(logits.transpose(1, 2), labels, self.empty_weight)

    def _mask_losses(
        self, masks: Tensor, targets: Sequence[Targets], matches: Sequence[Match]
    ) -> tuple[Tensor, Tensor]:
        """Sum the mask losses over the matched masks."""
        device = masks.device
        predicted = torch.cat([m[q.to(device)] for m, (q, _) in zip(masks, matches, strict=True)]).float()
        truth = torch.cat([t.masks[i.to(device)] for t, (_, i) in zip(targets, matches, strict=True)]).float()
        if self.sampling[0]:
            points = uncertain_points(predicted, *self.sampling)
            predicted, truth = sample_points(predicted, points), sample_points(truth, points)
            loss = F.binary_cross_entropy_with_logits(predicted, truth, reduction="none").mean(dim=1)
        else:
            size = truth.shape[-2:]
            predicted = F.interpolate(predicted[:, None], size=size, mode="bilinear", align_corners=False)
            predicted, truth = predicted.flatten(1), truth.flatten(1)
            loss = sigmoid_focal_loss(predicted, truth)
        return loss.sum(), dice_loss(predicted, truth).sum()
