"""Layers that pixel decoders and transformer decoders share.

Modules keep the names that they have in the published checkpoints of MaskFormer and Mask2Former.
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
        """(..., in_dim) -> (..., out_dim)."""
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x)


class FeedForward(nn.Module):
    """Base of transformer layers: dropout, and the two linear layers at the end."""

    def __init__(self, dim: int, hidden_dim: int, dropout: float) -> None:
        super().__init__()
        self.linear1 = nn.Linear(dim, hidden_dim)
        self.linear2 = nn.Linear(hidden_dim, dim)
        self.dropout = nn.Dropout(dropout)

    def feed_forward(self, x: Tensor) -> Tensor:
        """(..., dim) -> (..., dim)."""
        return self.linear2(self.dropout(F.relu(self.linear1(x))))


def residual(
    x: Tensor, norm: nn.Module, sublayer: Callable[[Tensor], Tensor], dropout: nn.Module, pre_norm: bool
) -> Tensor:
    """A sub-layer beside its shortcut; the norm is of the sum, or with ``pre_norm`` of what the sub-layer
    reads."""
    return x + dropout(sublayer(norm(x))) if pre_norm else norm(x + dropout(sublayer(x)))


def sine_position(height: int, width: int, dim: int, device: torch.device | None = None) -> Tensor:
    """Sine encoding of positions normalised to (0, 2 pi] (Carion et al., DETR, ECCV 2020, appendix A.4).

    Returns:
        (dim, height, width): sines and cosines in turn, the first half of y, the second of x.

    Raises:
        ValueError: ``dim`` is no multiple of 4.
    """
    if dim % 4:
        raise ValueError(f"a sine position of {dim} dimensions: it takes a multiple of 4")
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
    """(..., C, H, W) -> (..., H * W, C)."""
    return x.flatten(-2).transpose(-1, -2)


def to_map(tokens: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, H * W, C) -> (B, C, H, W)."""
    return tokens.transpose(1, 2).unflatten(2, size)


def conv_norm(in_channels: int, out_channels: int, kernel: int, norm: str, *, relu: bool) -> Conv2d:
    """A convolution that keeps the size, with a norm, or a bias where ``norm`` is ""."""
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
    """1x1 convolution to ``dim`` channels; none where there are as many already, unless ``always``."""
    if in_channels == dim and not always:
        return nn.Identity()
    conv = nn.Conv2d(in_channels, dim, 1)
    weight_init.c2_xavier_fill(conv)
    return conv


def xavier_matrices(module: nn.Module) -> None:
    """Xavier-uniform initialisation of everything with two axes or more (in place)."""
    for parameter in module.parameters():
        if parameter.dim() > 1:
            nn.init.xavier_uniform_(parameter)
