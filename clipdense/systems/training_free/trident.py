"""Trident: windows are spliced after the last attention, and SAM's attention aggregates the whole map."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from clipdense.clip.position import Grid
from clipdense.clip.towers import TowerRequest, TransformerTower
from clipdense.clip.towers.base import to_map

__all__ = ["sam_affinity", "splice", "trident_dense", "trident_size", "window_tokens"]


def trident_size(height: int, width: int, patch_size: int, crop: int) -> tuple[int, int]:
    """Return the size that an image is resized to, so that windows consist of whole patches.

    If a side is not a multiple of the patch, the longer side goes up to the next multiple, the other one
    follows by ratio, then up to a multiple; both are at least the window.
    """
    if height % patch_size or width % patch_size:
        longest = max(height, width)
        target = -(-longest // patch_size) * patch_size
        sides = [target if side == longest else int(side * target / longest) for side in (height, width)]
        height, width = (-(-side // patch_size) * patch_size for side in sides)
    return max(height, crop), max(width, crop)


def window_tokens(
    tower: TransformerTower, crops: Tensor, features: Tensor, *, beta: float = 1.2, gamma: float = 3.0
) -> Tensor:
    """Run the last block of all windows of an image with ProxyCLIP's attention, without the final norm.

    Args:
        tower: a ViT.
        crops: (n, 3, h, w), all windows of one image: they share the mean of the similarities.
        features: (n, C, h', w') patch features of another model.
        beta: see `feature_attention`.
        gamma: see `feature_attention`.

    Returns:
        (n, C', h', w').
    """
    last = len(tower.blocks) - 1
    options = {"beta": beta, "gamma": gamma, "shared_mean": True}
    request = TowerRequest((last,), tap_mode="proxyclip", guidance=features, options=options)
    tokens: Tensor = tower(crops, request).taps[0][0]
    return tokens


def splice(maps: Tensor, starts: Sequence[tuple[int, int]], window: Grid, size: Grid) -> Tensor:
    """Average the maps of windows where they overlap.

    Args:
        maps: (n, C, h, w).
        starts: row and column of the first patch of each window.
        window: (rows, columns) of patches in a window.
        size: (rows, columns) of patches in the image.

    Returns:
        (1, C, size * r), r the maps' cells per patch. If the maps are not a multiple of the window, they are
        resized bilinearly to the nearest one.
    """
    factor = maps.shape[3] // window[1]
    if maps.shape[3] % window[1]:
        factor = max(round(maps.shape[2] / window[0]), 1)
        cells = window[0] * factor, window[1] * factor
        maps = F.interpolate(maps, cells, mode="bilinear", align_corners=False)
    h, w = maps.shape[2:]
    canvas = maps.new_zeros(1, maps.shape[1], size[0] * factor, size[1] * factor)
    count = maps.new_zeros(canvas.shape[2:])
    for part, (y, x) in zip(maps, starts, strict=True):
        rows, columns = slice(y * factor, y * factor + h), slice(x * factor, x * factor + w)
        canvas[0, :, rows, columns] += part
        count[rows, columns] += 1
    return canvas / count


def sam_affinity(attention: Tensor, values: Tensor, *, factor: float, keep_negative: bool) -> Tensor:
    """Turn SAM's last attention into an affinity: keys whose values differ from the query's are left out.

    Args:
        attention: (heads, N, N) after the softmax.
        values: (heads, N, d).
        factor: a key stays if the cosine of its value exceeds ``factor`` times the mean over heads and keys.
        keep_negative: accept thresholds below 0; otherwise they become 0.6. All are at most 0.9.

    Returns:
        (N, N), rows sum to 1.

    Source: Trident (Shi et al., ICCV 2025), section 3.3.
    """
    v = F.normalize(values, dim=2)
    cosines = v @ v.transpose(1, 2)
    threshold = factor * cosines.mean((0, 2))
    if not keep_negative:
        threshold = threshold.masked_fill(threshold < 0, 0.6)
    threshold = threshold.clamp(max=0.9)[None, :, None]
    kept = attention.masked_fill(cosines <= threshold, 0).mean(0)
    return kept / kept.sum(1, keepdim=True)


def trident_dense(
    tower: TransformerTower, canvas: Tensor, affinities: Sequence[Tensor], grids: Sequence[Grid]
) -> Tensor:
    """Aggregate a spliced map by SAM's affinity, then norm and project it.

    Args:
        tower: a ViT.
        canvas: (1, C, h, w) from `splice`.
        affinities: one (N, N) for the whole image, or two for its left and right halves, which are joined.
        grids: (rows, columns) of each affinity.

    Returns:
        (1, D, rows, columns) on SAM's grid.
    """
    parts = []
    for part, affinity, grid in zip(canvas.chunk(len(affinities), 3), affinities, grids, strict=True):
        resized = F.interpolate(part, grid, mode="bilinear", align_corners=False)
        tokens = affinity.to(resized) @ resized.flatten(2).transpose(1, 2)
        parts.append(to_map(tower.project(tower.norm_tokens(tokens)), grid))
    return torch.cat(parts, 3)
