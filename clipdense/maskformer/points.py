"""Points on masks (Kirillov et al., PointRend, CVPR 2020), on which Mask2Former computes costs and losses."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["sample_points", "uncertain_points"]


def sample_points(masks: Tensor, points: Tensor) -> Tensor:
    """Bilinear values of masks at points.

    Args:
        masks: (N, H, W).
        points: (N, P, 2) or, the same for all, (1, P, 2); x and y in 0..1.

    Returns:
        (N, P); beyond the outermost pixel centres a mask fades to zero.
    """
    if len(points) == 1 != len(masks):  # one image with N channels
        return F.grid_sample(masks[None], 2 * points[:, :, None] - 1, align_corners=False)[0, :, :, 0]
    return F.grid_sample(masks[:, None], 2 * points[:, :, None] - 1, align_corners=False)[:, 0, :, 0]


@torch.no_grad()
def uncertain_points(masks: Tensor, num: int, oversample_ratio: float, importance_ratio: float) -> Tensor:
    """Points of which most lie where a mask is least certain (PointRend, section 3.1).

    Args:
        masks: mask logits (N, H, W).
        num: of points a mask.
        oversample_ratio: this many times ``num`` uniform points are looked at.
        importance_ratio: share of ``num`` that are the least certain of them; the rest is uniform.

    Returns:
        (N, num, 2), the least certain first.
    """
    drawn = torch.rand(len(masks), int(num * oversample_ratio), 2, device=masks.device)
    important = int(importance_ratio * num)
    index = (-sample_points(masks, drawn).abs()).topk(important, dim=1).indices
    chosen = drawn.gather(1, index[:, :, None].expand(-1, -1, 2))
    rest = torch.rand(len(masks), num - important, 2, device=masks.device)
    return torch.cat([chosen, rest], dim=1)
