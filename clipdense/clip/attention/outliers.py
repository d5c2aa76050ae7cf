"""Patch tokens that carry global instead of local content: their detection and repair."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from clipdense.clip.position import Grid


def local_outlier_factor(tokens: Tensor, neighbours: int = 30) -> Tensor:
    """Compute how much sparser the surroundings of each token are than those of its neighbours.

    The reach distance of a pair is the maximum of its squared distance and the first token's own distance to
    its last neighbour; density is the inverse of the mean reach distance.

    Args:
        tokens: (B, N, C).
        neighbours: number of nearest tokens, at most N - 1.

    Returns:
        (B, N), the mean ratio of the neighbours' density and the own one.

    Source: SC-CLIP (Bai et al., TIP 2025); the local outlier factor (Breunig et al., SIGMOD 2000) would take
        the neighbour's distance to its last neighbour.
    """
    squared = tokens.square().sum(2)
    distances = squared[:, :, None] + squared[:, None] - 2 * tokens @ tokens.transpose(1, 2)
    count = min(neighbours, tokens.shape[1] - 1)
    nearest, index = distances.topk(count + 1, dim=2, largest=False)
    nearest, index = nearest[..., 1:], index[..., 1:]  # without the token itself
    reach = torch.maximum(nearest, nearest[..., -1:])
    density = count / reach.mean(2)
    ratio = density[:, None].expand(-1, tokens.shape[1], -1).gather(2, index) / density[..., None]
    return ratio.mean(2)


def above_quantile(scores: Tensor, share: float) -> Tensor:
    """Mark the scores (B, N) above the quantile 1 - ``share`` of each row."""
    return scores > scores.quantile(1 - share, dim=1, keepdim=True)


def attended_outliers(weights: Tensor, prefix: int, factor: float, count: int) -> Tensor:
    """Mark patches that the class token attends to more than they attend to themselves.

    Args:
        weights: (B, L, L) attention, mean over heads.
        prefix: number of tokens before the patches; the first is the class token.
        factor: of the class token's attention in the comparison.
        count: number of patches to mark at most: those with the largest attention of the class token.

    Returns:
        (B, N) bool.

    Source: SFP (ICCV 2025), outlier mode "SOM".
    """
    seen = weights[:, 0, prefix:] * factor
    own = weights.diagonal(dim1=1, dim2=2)[:, prefix:]
    candidates = seen.masked_fill(seen <= own, -torch.inf)
    top, index = candidates.topk(min(count, candidates.shape[1]), dim=1)
    marked = torch.zeros_like(seen, dtype=torch.bool)
    return marked.scatter(1, index, top > -torch.inf)


def repair(tokens: Tensor, outliers: Tensor, grid: Grid, *, keep_isolated: bool) -> Tensor:
    """Replace outliers by the mean of those of their eight neighbours that are none.

    Args:
        tokens: (B, N, C) patches.
        outliers: (B, N) bool.
        grid: (h, w).
        keep_isolated: keep an outlier without such a neighbour (SC-CLIP); otherwise it becomes 0 (SFP).
    """
    maps = tokens.transpose(1, 2).reshape(tokens.shape[0], tokens.shape[2], *grid)
    valid = (~outliers).reshape(-1, 1, *grid).to(maps)
    kernel = maps.new_ones(1, 1, 3, 3)
    count = F.conv2d(valid, kernel, padding=1)
    channels = maps.shape[1]
    total = F.conv2d(maps * valid, kernel.expand(channels, -1, -1, -1), padding=1, groups=channels)
    mean = total / count.clamp(min=1)
    if keep_isolated:
        mean = torch.where(count > 0, mean, maps)
    return torch.where(valid > 0, maps, mean).flatten(2).transpose(1, 2)
