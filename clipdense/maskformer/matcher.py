"""Bipartite matching of predicted to true masks."""

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
"""Matched queries, ascending, and their targets: two index vectors (n,)."""


def class_cost(logits: Tensor, labels: Tensor) -> Tensor:
    """Minus the probability of the true class: logits (Q, K + 1), labels (N,) -> (Q, N)."""
    return -logits.softmax(dim=1)[:, labels]


def focal_cost(logits: Tensor, masks: Tensor, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """Focal loss of every pair, mean over pixels: logits (Q, P), masks (N, P) in 0..1 -> (Q, N)."""
    p = logits.sigmoid()
    inside = alpha * (1 - p) ** gamma * F.softplus(-logits)
    outside = (1 - alpha) * p**gamma * F.softplus(logits)
    return (inside @ masks.T + outside @ (1 - masks).T) / logits.shape[1]


def cross_entropy_cost(logits: Tensor, masks: Tensor) -> Tensor:
    """Binary cross entropy of every pair, mean over pixels: logits (Q, P), masks (N, P) in 0..1 -> (Q, N)."""
    return (F.softplus(-logits) @ masks.T + F.softplus(logits) @ (1 - masks).T) / logits.shape[1]


def dice_cost(logits: Tensor, masks: Tensor) -> Tensor:
    """Dice loss of every pair: logits (Q, P), masks (N, P) in 0..1 -> (Q, N)."""
    p = logits.sigmoid()
    return 1 - (2 * p @ masks.T + 1) / (p.sum(dim=1)[:, None] + masks.sum(dim=1) + 1)


class HungarianMatcher(nn.Module):
    """Gives every true mask the query of its own that makes the sum of costs least.

    With points the mask costs are cross entropy and dice on points that all masks of an image share
    (Mask2Former), without focal loss and dice on all pixels of the prediction (MaskFormer).
    """

    def __init__(self, *, cost_class: float, cost_mask: float, cost_dice: float, num_points: int = 0) -> None:
        """
        Args:
            cost_class, cost_mask, cost_dice: weights of the costs.
            num_points: of an image; 0 for all pixels.
        """
        super().__init__()
        self.cost_class, self.cost_mask, self.cost_dice = cost_class, cost_mask, cost_dice
        self.num_points = num_points

    def costs(self, logits: Tensor, masks: Tensor, target: Targets) -> Tensor:
        """Weighted costs (Q, N) of one image: class logits (Q, K + 1), mask logits (Q, H, W)."""
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
        """Matches of each image, at most as many as queries, on the CPU.

        Args:
            logits: of classes (B, Q, K + 1).
            masks: mask logits (B, Q, H, W).
            targets: true masks, any number of them, none too.
        """
        with torch.autocast(logits.device.type, enabled=False):
            costs = [self.costs(*image) for image in zip(logits.float(), masks.float(), targets, strict=True)]
        # what has diverged is matched anyhow, so that the losses show it
        pairs = [linear_sum_assignment(cost.nan_to_num(1e6, 1e6, -1e6).cpu().numpy()) for cost in costs]
        return [(torch.as_tensor(query), torch.as_tensor(target)) for query, target in pairs]
