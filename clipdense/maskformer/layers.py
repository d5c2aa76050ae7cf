"""Layers that pixel decoders and transformer decoders share.

Modules have the names of the published checkpoints of MaskFormer and Mask2Former.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import fvcore.nn.weight_init as weight_init
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detectron2.layers import Conv2d, get_norm

__all__ = [
    "MLP",
    "FeedForward",
    "build_input_proj",
    "conv_norm",
    "residual",
    "sine_position",
    "to_map",
    "to_tokens",
    "xavier_matrices",
]


class MLP(nn.Module):
    """Linear layers with ReLU between them."""

    def __init__(self, in_dim: int, hidden_dim: int, out_dim: int, num_layers: int) -> None:
        super().__init__()
        sizes = [in_dim, *[hidden_dim] * (num_layers - 1), out_dim]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in_dim) to (..., out_dim)."""
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x)


class FeedForward(nn.Module):
    """Base class of transformer layers: dropout and the feed-forward layers."""

    def __init__(self, dim: int, hidden_dim: int, dropout: float) -> None:
        super().__init__()
        self.linear1 = nn.Linear(dim, hidden_dim)
        self.linear2 = nn.Linear(hidden_dim, dim)
        self.dropout = nn.Dropout(dropout)

    def feed_forward(self, x: Tensor) -> Tensor:
        """Apply the feed-forward layers to (..., dim)."""
        return self.linear2(self.dropout(F.relu(self.linear1(x))))


def residual(
    x: Tensor, norm: nn.Module, sublayer: Callable[[Tensor], Tensor], dropout: nn.Module, pre_norm: bool
) -> Tensor:
    """Add a sub-layer to its shortcut, with the norm after the sum, or with `pre_norm` before the
    sub-layer."""
    return x + dropout(sublayer(norm(x))) if pre_norm else norm(x + dropout(sublayer(x)))


def sine_position(height: int, width: int, dim: int, device: torch.device | None = None) -> Tensor:
    """Encode positions, normalised to (0, 2 pi], by sines (Carion et al., DETR, ECCV 2020, appendix A.4).

    Returns:
        (dim, height, width), alternating sines and cosines; the first half encodes y, the second x.

    Raises:
        ValueError: If `dim` is not a multiple of 4.
    """
    if dim % 4:
        raise ValueError(f"sine positions need a multiple of 4 dimensions, not {dim}")
    k = torch.arange(dim // 2, device=device)
    period = 10000 ** (2 * (k // 2) / (dim // 2))

    def axis(n: int) -> Tensor:
        position = torch.arange(1, n + 1, dtype=torch.float32, device=device) / (n + 1e-6) * (2 * math.pi)
        angle = position[:, None] / period
        return torch.stack([angle[:, 0::2].sin(), angle[:, 1::2].cos()], dim=2).flatten(1)

    y = axis(height)[:, None].expand(-1, width, -1)
    x = axis(width)[None].expand(height, -1, -1)
    return torch.cat([y, x], dim=2).permute(2, 0, 1)


def to_tokens(x: Tensor) -> Tensor:
    """Flatten maps (..., C, H, W) to tokens (..., H * W, C)."""
    return x.flatten(-2).transpose(-1, -2)


def to_map(tokens: Tensor, size: tuple[int, int]) -> Tensor:
    """Fold tokens (B, H * W, C) to maps (B, C, H, W)."""
    return tokens.transpose(1, 2).unflatten(2, size)


def conv_norm(in_channels: int, out_channels: int, kernel: int, norm: str, *, relu: bool) -> Conv2d:
    """Build a convolution that keeps the size, with a norm, or with a bias if `norm` is ""."""
    conv = Conv2d(
        in_channels,
        out_channels,
        kernel,
        padding=kernel // 2,
        bias=not norm,
        norm=get_norm(norm, out_channels),
        activation=F.relu if relu else None,
    )
    weight_init.c2_xavier_fill(conv)
    return conv


def build_input_proj(in_channels: int, dim: int, always: bool) -> nn.Module:
    """Build a 1 x 1 convolution to `dim` channels, or an identity if `in_channels` equals `dim`, unless
    `always`."""
    if in_channels == dim and not always:
        return nn.Identity()
    conv = nn.Conv2d(in_channels, dim, 1)
    weight_init.c2_xavier_fill(conv)
    return conv


def xavier_matrices(module: nn.Module) -> None:
    """Initialise each parameter with at least two axes Xavier-uniformly, in place."""
    for parameter in module.parameters():
        if parameter.dim() > 1:
            nn.init.xavier_uniform_(parameter)
