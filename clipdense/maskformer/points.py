"""Points of masks (Kirillov et al., PointRend, CVPR 2020), for Mask2Former's matching costs and losses."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["sample_points", "uncertain_points"]


def sample_points(masks: Tensor, points: Tensor) -> Tensor:
    """Sample masks at points, bilinearly.

    Args:
        masks: (N, H, W).
        points: (N, P, 2), or (1, P, 2) for all masks; x and y in 0 .. 1.

    Returns:
        (N, P); a mask fades to zero beyond the outermost pixel centres.
    """
    if len(points) == 1 != len(masks):  # as one image with N channels
        return F.grid_sample(masks[None], 2 * points[:, :, None] - 1, align_corners=False)[0, :, :, 0]
    return F.grid_sample(masks[:, None], 2 * points[:, :, None] - 1, align_corners=False)[:, 0, :, 0]


@torch.no_grad()
def uncertain_points(masks: Tensor, num: int, oversample_ratio: float, importance_ratio: float) -> Tensor:
    """Draw points that lie mostly where a mask is uncertain (PointRend, section 3.1).

    Args:
        masks: (N, H, W) mask logits.
        num: Points per mask.
        oversample_ratio: Uniform candidates per point.
        importance_ratio: Share of the points that are the least certain candidates; the others are uniform.

    Returns:
        (N, num, 2), the least certain first.
    """
    drawn = torch.rand(len(masks), int(num * oversample_ratio), 2, device=masks.device)
    important = int(importance_ratio * num)
    index = (-sample_points(masks, drawn).abs()).topk(important, dim=1).indices
    chosen = drawn.gather(1, index[:, :, None].expand(-1, -1, 2))
    rest = torch.rand(len(masks), num - important, 2, device=masks.device)
    return torch.cat([chosen, rest], dim=1)
