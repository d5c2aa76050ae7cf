"""CorrCLIP: patches correlate within regions, and region tokens and middle blocks join the result."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from clipdense.clip.attention import History, TokenStream, plain
from clipdense.clip.attention.proxy import attend_externally
from clipdense.clip.mask_tokens import MaskTokens
from clipdense.clip.position import Grid
from clipdense.clip.towers import TransformerTower
from clipdense.clip.towers.base import to_map

__all__ = ["corrclip_dense", "correct_labels", "merge_regions", "region_attention"]

PADDING_REGION = 10000
"""Region id of the pixels that pad a window."""
SPATIAL_BLOCKS = {12: 5, 24: 12, 32: 28}
"""Blocks that the spatial branch averages, by the depth of the tower."""


def _nearest(ids: Tensor, grid: Grid) -> Tensor:
    """Resize ids (h, w) to a grid by the nearest pixel."""
    return F.interpolate(ids[None, None].double(), grid, mode="nearest")[0, 0].long()


def merge_regions(regions: Tensor, features: Tensor, *, distance: float = 0.2) -> Tensor:
    """Number the regions of a window, joining those with similar features.

    The smallest id is the rest, whatever it is. The others join if a chain of regions leads from one to the
    other whose neighbours differ by at most ``distance`` in cosine (DBSCAN with one sample).

    Args:
        regions: (h, w) int64 ids on the grid of the features.
        features: (h w, C), L2-normalised.
        distance: below the largest cosine of two regions. Nothing is joined if there are at most two ids.

    Returns:
        (h, w) int64: 0 for the rest, 1 and more for the regions.
    """
    ids, numbers = regions.unique(return_inverse=True)
    if len(ids) <= 2:
        return numbers
    inside = F.one_hot(numbers.flatten(), len(ids)).to(features)[:, 1:]
    means = F.normalize(inside.T @ features / inside.sum(0)[:, None], dim=1)
    cosines = means @ means.T
    near = (cosines.max() - cosines) <= distance
    reach = near | torch.eye(len(near), dtype=torch.bool, device=near.device)
    for _ in range(max(len(near) - 1, 1).bit_length()):
        reach = (reach.float() @ reach.float()) > 0
    component = reach.float().argmax(1)  # the first region that each can reach
    return torch.cat([component.new_zeros(1), component + 1])[numbers]


def region_attention(features: Tensor, regions: Tensor | None, *, temperature: float = 4.0) -> Tensor:
    """Compute softmax(4 S) of the cosines S, restricted to pairs of one region.

    A pair with a patch of the rest (region 0) is allowed if S is above its mean.

    Args:
        features: (N, C), L2-normalised.
        regions: (N,) int64, from `merge_regions`; None allows all pairs.
        temperature: factor of S.

    Returns:
        (N, N), rows are queries.
    """
    similarity = features @ features.T
    logits = temperature * similarity
    if regions is not None:
        rest = regions == 0
        same = (regions[:, None] == regions[None]) & ~rest[:, None]
        either = rest[:, None] | rest[None]
        itself = torch.eye(len(rest), dtype=torch.bool, device=rest.device)
        allowed = same | itself | (either & (similarity > similarity.mean()))
        logits = logits.masked_fill(~allowed, -torch.inf)
    return logits.softmax(-1)


def corrclip_dense(
    tower: TransformerTower,
    images: Tensor,
    features: Tensor,
    regions: Tensor,
    *,
    spatial: float = 1.0,
    semantic: float = 0.5,
    temperature: float = 4.0,
    distance: float = 0.2,
    num_spatial: int | None = None,
    merge: bool = True,
    restrict: bool = True,
) -> Tensor:
    """Compute the dense map of one window.

    Args:
        tower: a ViT with a class token.
        images: (1, 3, H, W), normalised.
        features: (1, C, h, w) patch features of another model (DINO: queries + keys of its last block).
        regions: (H, W) region ids.
        spatial: weight of the branch of middle blocks.
        semantic: weight of the branch of region tokens.
        temperature: see `region_attention`.
        distance: see `merge_regions`.
        num_spatial: number of blocks, ending before the second last output, that the spatial branch averages;
            None: by the depth of the tower.
        merge: whether similar regions are joined.
        restrict: whether pairs are restricted to regions.

    Returns:
        (1, D, h, w) on the grid of the features.

    Source: CorrCLIP (Zhang et al., ICCV 2025).
    """
    grid = (features.shape[2], features.shape[3])
    e = F.normalize(features[0].flatten(1).T, dim=1)
    merged = _nearest(regions, grid)
    merged = merge_regions(merged, e, distance=distance) if merge else merged.unique(return_inverse=True)[1]
    weights = region_attention(e, merged.flatten() if restrict else None, temperature=temperature)[None]

    tokens_grid = (images.shape[2] // tower.stride, images.shape[3] // tower.stride)
    on_tokens = _nearest(merged, tokens_grid)
    masks = F.one_hot(on_tokens, int(merged.max()) + 1).permute(2, 0, 1)[None]
    history = tower.history(images, MaskTokens(tower, masks))
    main = attend_externally(history.block, history.stream, weights, grid)
    middle = _middle_stream(history, num_spatial)
    side = attend_externally(history.block, middle, weights, grid)
    copies = plain(history.block, history.stream).x[:, tower.prefix : tower.prefix + masks.shape[1]]
    spread = copies[:, _nearest(on_tokens, grid).flatten()]
    normed = (
        tower.norm_tokens(main.x) + spatial * tower.norm_tokens(side.x) + semantic * tower.norm_tokens(spread)
    )
    return to_map(tower.project(normed), grid)


def _middle_stream(history: History, num_spatial: int | None) -> TokenStream:
    """Return the mean of the outputs of middle blocks as a stream of patches."""
    depth = len(history)
    count = SPATIAL_BLOCKS.get(depth, max(depth - 4, 1)) if num_spatial is None else num_spatial
    outputs = [history.output(i) for i in range(max(depth - 2 - count, 0), max(depth - 2, 1))]
    h, w = history.stream.grid
    return TokenStream(torch.stack(outputs).mean(0)[:, -h * w :], (h, w))


def correct_labels(labels: Tensor, regions: Tensor) -> Tensor:
    """Give every pixel of a region the most frequent label of the region.

    Args:
        labels: (H, W) int64.
        regions: (H, W) int64; the smallest id keeps its labels.

    Returns:
        (H, W); among equally frequent labels the smallest.
    """
    ids, numbers = regions.unique(return_inverse=True)
    lowest = int(labels.min())
    classes = int(labels.max()) - lowest + 1
    pairs = numbers.flatten() * classes + (labels - lowest).flatten()
    counts = torch.bincount(pairs, minlength=len(ids) * classes).reshape(len(ids), classes)
    mode = counts.argmax(1) + lowest
    return torch.where(numbers == 0, labels, mode[numbers])
