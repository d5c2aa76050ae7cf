"""Modes whose last block attends by the features of another model."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from clipdense.clip.attention.block import Block, TokenStream
from clipdense.clip.attention.mode import dense_mode
from clipdense.clip.position import Grid

FEATURES = "patch features (B, C, h, w) of another model"


@dense_mode("proxyclip", guidance=FEATURES)
def proxyclip(
    block: Block,
    stream: TokenStream,
    features: Tensor,
    *,
    beta: float = 1.2,
    gamma: float = 3.0,
    shared_mean: bool = False,
) -> TokenStream:
    """Attend by the similarity of external features, on their grid, without residual and MLP.

    Args:
        block: view of the last block.
        stream: tokens that enter it; only patches are used.
        features: (B, C, h, w).
        beta: see `feature_attention`.
        gamma: see `feature_attention`.
        shared_mean: see `feature_attention`.

    Source: ProxyCLIP (Lan et al., ECCV 2024), section 3.2.
    """
    weights = feature_attention(features, beta=beta, gamma=gamma, shared_mean=shared_mean)
    return attend_externally(block, stream, weights, (features.shape[2], features.shape[3]))


def feature_attention(
    features: Tensor, *, beta: float = 1.2, gamma: float = 3.0, shared_mean: bool = False
) -> Tensor:
    """Compute softmax(gamma (S - beta mean(S))) of the cosines S of features; keys below 0 are left out.

    Args:
        features: (B, C, h, w).
        beta: threshold as a multiple of the mean.
        gamma: inverse temperature.
        shared_mean: take the mean of S over all images together; by default each image has its own. The
            released ProxyCLIP runs one window at a time; Trident shares the mean among the windows of an
            image.

    Returns:
        (B, h w, h w), rows are queries.
    """
    e = F.normalize(features.flatten(2), dim=1)
    similarity = e.transpose(1, 2) @ e
    mean = similarity.mean() if shared_mean else similarity.mean((1, 2), keepdim=True)
    return positive_softmax(gamma * (similarity - beta * mean))


def positive_softmax(logits: Tensor) -> Tensor:
    """Compute the softmax (..., N, N) over the keys whose logits are at least 0, and over the query itself.

    The query itself stays where features hardly differ, and no key would be left.
    """
    itself = torch.eye(logits.shape[-1], dtype=torch.bool, device=logits.device)
    return logits.masked_fill((logits < 0) & ~itself, -torch.inf).softmax(-1)


def attend_externally(block: Block, stream: TokenStream, weights: Tensor, grid: Grid) -> TokenStream:
    """Average the values of patches with external weights, the same for all heads.

    Args:
        block: view of the last block.
        stream: tokens that enter it.
        weights: (B, h w, h w) on another grid; rows are queries.
        grid: (h, w) of the weights; the values are resized to it bilinearly.

    Returns:
        Patch tokens on the grid of the weights, without residual and MLP.
    """
    v = block.value(block.normed(stream.patches))
    v = v.transpose(1, 2).reshape(v.shape[0], v.shape[2], *stream.grid)
    if grid != stream.grid:
        v = F.interpolate(v, grid, mode="bilinear", align_corners=False)
    y = weights.to(v) @ v.flatten(2).transpose(1, 2)
    return replace(stream, x=block.out(y), grid=grid, rope=None, bias=None)
