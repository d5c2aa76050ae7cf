"""Local attention for the attention pool of a ResNet."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from clipdense.clip.towers import Tower

__all__ = ["POOL_CHANNELS", "localize_pool"]

POOL_CHANNELS = 4
"""Channels of C5 in which the position table lies: x, y, half of the squared radius, and 1."""


@torch.no_grad()
def localize_pool(visual: Tower, sharpness: float = 16.0, amplitude: float = 100.0) -> None:
    """Give a ResNet's attention pool local attention that training does not change.

    Image-text training does not train the queries of single positions. Their attention, and with it the dense
    map in "plain" mode, would keep its random initial state, or would follow the content once the attention
    of the mean token is trained. Therefore the table, the queries and the keys are set here and frozen:

    - Three dimensions of each head form the logit ``sharpness * (p_i . p_j - |p_j|^2 / 2 + 1 / 4)`` of the
      positions i and j. Up to a constant of i, this is ``-sharpness / 2 * |p_i - p_j|^2``: the attention is a
      Gaussian around i. The last summand is for positions only, not for the mean token as a key.
    - The other dimensions compare content, with small random weights.
    - The mean token has no position. It attends to all positions nearly equally.

    The value projection ignores the channels of the table, before and during training. Otherwise it learns
    offsets that cancel in the mean token but not in the dense maps.

    Args:
        visual: a ResNet tower with an attention pool; changed in place.
        sharpness: precision of the Gaussian, > 0; the unit of length is a cell of the native grid.
        amplitude: factor of the position table, > 0. It must be large against C5, whose values are added.

    Raises:
        ValueError: If the tower has no attention pool.

    Source: the quadratic encoding of Cordonnier et al., ICLR 2020, section 3.
    """
    pool = getattr(visual, "attnpool", None)
    if pool is None:
        raise ValueError(
            f"MODEL.CONTRASTIVE_CLIP.LOCAL_POOL is for ResNets with an attention pool, not for a "
            f"{type(visual).__name__}; set it to False"
        )
    pool.positional_embedding.zero_()
    pool.positional_embedding[1:, :POOL_CHANNELS] = amplitude * _codes(*visual.grid)
    head_dim = pool.q_proj.out_features // pool.num_heads
    gain = (sharpness * head_dim**0.5) ** 0.5 / amplitude  # attention divides by the root of head_dim
    _set_projection(pool.q_proj, pool.num_heads, gain * torch.eye(4)[[0, 1, 3]])
    keys = torch.tensor([[1.0, 0, 0, 0], [0, 1, 0, 0], [0, 0, -1, 0.25]])
    _set_projection(pool.k_proj, pool.num_heads, gain * keys)
    pool.positional_embedding.requires_grad_(False)
    pool.v_proj.weight[:, :POOL_CHANNELS] = 0
    pool.v_proj.weight.register_hook(_clear_pool_channels)


def _codes(rows: int, columns: int) -> Tensor:
    """Return x, y, half of the squared radius, and 1 of each cell, (rows * columns, 4)."""
    y, x = torch.meshgrid(
        torch.arange(rows) - (rows - 1) / 2, torch.arange(columns) - (columns - 1) / 2, indexing="ij"
    )
    return torch.stack([x, y, (x * x + y * y) / 2, torch.ones_like(x)], dim=-1).flatten(0, 1)


def _set_projection(projection: nn.Linear, heads: int, of_codes: Tensor) -> None:
    """Set and freeze the projection: ``of_codes`` (n, 4) in the first n dimensions of each head."""
    weight = projection.weight.view(heads, -1, projection.in_features)
    nn.init.normal_(weight, std=projection.in_features**-0.5)
    weight[:, :, :POOL_CHANNELS] = 0
    weight[:, : len(of_codes)] = 0
    weight[:, : len(of_codes), :POOL_CHANNELS] = of_codes
    projection.bias.zero_()
    projection.requires_grad_(False)


def _clear_pool_channels(gradient: Tensor) -> Tensor:
    cleared = gradient.clone()
    cleared[:, :POOL_CHANNELS] = 0
    return cleared
