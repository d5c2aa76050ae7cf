"""Bipartite matching of predicted masks to ground-truth masks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from clipdense.maskformer.points import sample_points
from clipdense.maskformer.prediction import Targets

__all__ = ["HungarianMatcher", "Match", "class_cost", "cross_entropy_cost", "dice_cost", "focal_cost"]

Match = tuple[Tensor, Tensor]
"""Matched queries in ascending order and their targets: two index vectors (n,)."""


def class_cost(logits: Tensor, labels: Tensor) -> Tensor:
    """Compute the negative probability of each target's class (Q, N) from logits (Q, K + 1), labels (N,)."""
    return -logits.softmax(dim=1)[:, labels]


def focal_cost(logits: Tensor, masks: Tensor, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """Compute the focal loss of all pairs (Q, N), mean over pixels: logits (Q, P), masks (N, P) in 0 .. 1."""
    p = logits.sigmoid()
    inside = alpha * (1 - p) ** gamma * F.softplus(-logits)
    outside = (1 - alpha) * p**gamma * F.softplus(logits)
    return (inside @ masks.T + outside @ (1 - masks).T) / logits.shape[1]


def cross_entropy_cost(logits: Tensor, masks: Tensor) -> Tensor:
    """Compute the binary cross entropy of all pairs (Q, N), mean over pixels: logits (Q, P), masks (N, P) in
    0 .. 1."""
    return (F.softplus(-logits) @ masks.T + F.softplus(logits) @ (1 - masks).T) / logits.shape[1]


def dice_cost(logits: Tensor, masks: Tensor) -> Tensor:
    """Compute the dice loss of all pairs (Q, N): logits (Q, P), masks (N, P) in 0 .. 1."""
    p = logits.sigmoid()
    return 1 - (2 * p @ masks.T + 1) / (p.sum(dim=1)[:, None] + masks.sum(dim=1) + 1)


class HungarianMatcher(nn.Module):
    """Minimum-cost one-to-one assignment of queries to ground-truth masks.

    If `num_points` is above 0, the mask costs are cross entropy and dice loss on points that all masks of an
    image share (Mask2Former); otherwise focal and dice loss on all pixels of the prediction (MaskFormer).
    """

    def __init__(self, *, cost_class: float, cost_mask: float, cost_dice: float, num_points: int = 0) -> None:
        """
        Args:
            cost_class: Weight of the class cost.
            cost_mask: Weight of the focal or cross-entropy cost.
            cost_dice: Weight of the dice cost.
            num_points: Points per image; 0: all pixels.
        """
        super().__init__()
        self.cost_class, self.cost_mask, self.cost_dice = cost_class, cost_mask, cost_dice
        self.num_points = num_points

    def costs(self, logits: Tensor, masks: Tensor, target: Targets) -> Tensor:
        """Compute the weighted costs (Q, N) of one image from class logits (Q, K + 1), mask logits (Q, H,
        W)."""
        mask_cost: Callable[[Tensor, Tensor], Tensor]
        if self.num_points:
            points = torch.rand(1, self.num_points, 2, device=masks.device)
            truth = sample_points(target.masks.float(), points)
            masks, mask_cost = sample_points(masks, points), cross_entropy_cost
        else:
            size = masks.shape[-2:]
            truth = F.interpolate(target.masks[:, None].float(), size=size, mode="nearest").flatten(1)
            masks, mask_cost = masks.flatten(1), focal_cost
        return (
            self.cost_mask * mask_cost(masks, truth)
            + self.cost_class * class_cost(logits, target.labels)
            + self.cost_dice * dice_cost(masks, truth)
        )

    @torch.no_grad()
    def forward(self, logits: Tensor, masks: Tensor, targets: Sequence[Targets]) -> list[Match]:
        """Match each image.

        Args:
            logits: (B, Q, K + 1) class logits.
            masks: (B, Q, H, W) mask logits.
            targets: Ground truth of each image, with any number of masks.

        Returns:
            The matches of each image on the CPU, at most one for each query.
        """
        with torch.autocast(logits.device.type, enabled=False):
            costs = [self.costs(*image) for image in zip(logits.float(), masks.float(), targets, strict=True)]
        # Sanitise non-finite costs so that the losses expose divergence.
        pairs = [linear_sum_assignment(cost.nan_to_num(1e6, 1e6, -1e6).cpu().numpy()) for cost in costs]
        return [(torch.as_tensor(query), torch.as_tensor(target)) for query, target in pairs]
