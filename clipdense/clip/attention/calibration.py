"""SC-CLIP and SFP: repaired outliers, features of middle blocks that aggregate the last ones, two passes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from clipdense.clip.attention.block import Block, History, TokenStream
from clipdense.clip.attention.mode import dense_mode
from clipdense.clip.attention.outliers import (
    above_quantile,
    attended_outliers,
    local_outlier_factor,
    repair,
)
from clipdense.clip.attention.proxy import positive_softmax

DEPTH = 12
"""Number of blocks that the default levels are published for."""


@dataclass(frozen=True)
class Levels:
    """Blocks, 0-based, whose outputs `scclip` and `sfp` read.

    Attributes:
        pre: whose similarity aggregates the input of the last block.
        post: whose similarity aggregates its result.
        start: first block of the multi-level sum.
        end: block after the last of the multi-level sum.
    """

    pre: int
    post: int
    start: int
    end: int

    @classmethod
    def of(cls, depth: int, levels: tuple[int, int, int, int] | None) -> Levels:
        """Return the given levels, or the published ones (8, 3, 3 and 10 of 12 blocks) scaled to a depth.

        Raises:
            ValueError: If a block does not exist or is the last one, or the sum is empty.
        """
        if levels is None:
            scaled = [round(level * depth / DEPTH) for level in (8, 3, 3, 10)]
            last = depth - 2
            return cls(
                min(scaled[0], last), min(scaled[1], last), min(scaled[2], last), min(scaled[3], depth - 1)
            )
        chosen = cls(*levels)
        inside = max(chosen.pre, chosen.post, chosen.end - 1) < depth - 1
        if not (inside and 0 <= chosen.start < chosen.end and min(chosen.pre, chosen.post) >= 0):
            raise ValueError(
                f"levels {levels} do not fit a tower of {depth} blocks, the last one not counted"
            )
        return chosen


@dense_mode("scclip", class_token=True, reads_history=True)
def scclip(
    history: History,
    *,
    beta: float = 0.4,
    class_weight: float = 0.3,
    levels: tuple[int, int, int, int] | None = None,
    neighbours: int = 30,
    contamination: float = 0.05,
) -> TokenStream:
    """Self-calibrated last block: patches only, without residual and MLP.

    Args:
        history: the forward up to the last block.
        beta: similarities below it are 0 in aggregations.
        class_weight: factor of the class token, which is added to every patch.
        levels: see `Levels`; None: the published ones, scaled to the depth.
        neighbours: see `local_outlier_factor`.
        contamination: share of patches that are outliers.

    Source: SC-CLIP (Bai et al., TIP 2025).
    """
    patches = _patches(history, history.stream.x)
    outliers = above_quantile(local_outlier_factor(patches, neighbours), contamination)

    def attend(block: Block, x: Tensor, similarity: Tensor, second: bool) -> Tensor:
        _, k, v = _heads(block, x, history.stream)
        own: Tensor = (k @ k.transpose(2, 3) * k.shape[-1] ** -0.5).softmax(-1)
        return (_centred_attention(similarity)[:, None] + own) / 2 @ v

    return _calibrate(history, outliers, attend, beta, class_weight, levels, published_sfp=False)


@dense_mode("sfp", class_token=True, reads_history=True)
def sfp(
    history: History,
    *,
    beta: float = 0.4,
    class_weight: float = 0.3,
    levels: tuple[int, int, int, int] | None = None,
    outlier_scale: float = 5.0,
    max_outliers: int = 10,
) -> TokenStream:
    """Self-adaptive feature purifier: as `scclip`, with other outliers and another attention.

    Args:
        history: the forward up to the last block.
        beta: see `scclip`.
        class_weight: see `scclip`.
        levels: see `scclip`.
        outlier_scale: times ``class_weight``, the factor of `attended_outliers`.
        max_outliers: see `attended_outliers`.

    Source: SFP (ICCV 2025), outlier mode "SOM".
    """
    weights = history.weights(len(history) - 2).mean(1)
    grid = history.stream.grid
    prefix = weights.shape[1] - grid[0] * grid[1]
    outliers = attended_outliers(weights, prefix, class_weight * outlier_scale, max_outliers)

    def attend(block: Block, x: Tensor, similarity: Tensor, second: bool) -> Tensor:
        q, k, v = _heads(block, x, history.stream)
        external = _centred_attention(similarity)[:, None]
        if second:
            return external @ v
        own = [(t @ t.transpose(2, 3) * t.shape[-1] ** -0.5).softmax(-1) for t in (q, k)]
        y: Tensor = (own[0] + own[1] + external) / 3 @ v
        return y

    return _calibrate(history, outliers, attend, beta, class_weight, levels, published_sfp=True)


Attend = Callable[[Block, Tensor, Tensor, bool], Tensor]
"""From (block, normed patches (B, N, C), similarity (B, N, N), second pass) to (B, heads, N, head_dim)."""


def _calibrate(
    history: History,
    outliers: Tensor,
    attend: Attend,
    beta: float,
    class_weight: float,
    levels: tuple[int, int, int, int] | None,
    *,
    published_sfp: bool,
) -> TokenStream:
    block, stream, chosen = history.block, history.stream, Levels.of(len(history), levels)

    def repaired(tokens: Tensor) -> Tensor:
        return repair(tokens, outliers, stream.grid, keep_isolated=not published_sfp)

    def last_block(x: Tensor, cls: Tensor, second: bool) -> Tensor:
        y = attend(block, block.normed(x), similarity, second)
        return block.out(y.transpose(1, 2).flatten(2)) + class_weight * cls

    similarity = _cosines(repaired(_patches(history, history.output(chosen.pre))))
    above = similarity.masked_fill(similarity < beta, 0)
    similarity = above if published_sfp else similarity
    final = _cosines(_patches(history, history.output(chosen.post)))
    final = final.masked_fill(final < beta, 0)
    x = _aggregate(above, repaired(_patches(history, stream.x)))
    y = _aggregate(final, last_block(x, stream.x[:, :1], second=False))
    z = torch.stack([history.output(i) for i in range(chosen.start, chosen.end)]).sum(0)
    y2 = _aggregate(final, last_block(_patches(history, z), z[:, :1], second=True))
    return replace(stream, x=y + y2, bias=None)


def _patches(history: History, tokens: Tensor) -> Tensor:
    grid = history.stream.grid
    return tokens[:, tokens.shape[1] - grid[0] * grid[1] :]


def _heads(block: Block, u: Tensor, stream: TokenStream) -> tuple[Tensor, Tensor, Tensor]:
    return block.split_heads(*block.qkv(u), stream)


def _cosines(tokens: Tensor) -> Tensor:
    e = F.normalize(tokens, dim=2)
    return e @ e.transpose(1, 2)


def _aggregate(weights: Tensor, tokens: Tensor) -> Tensor:
    return weights / (weights.sum(2, keepdim=True) + 1e-6) @ tokens


def _centred_attention(similarity: Tensor, scale: float = 3.0) -> Tensor:
    """Compute softmax(scale (S - mean S)) per image, without negative entries."""
    return positive_softmax(scale * (similarity - similarity.mean((1, 2), keepdim=True)))
