"""Aggregation of cost embeddings over space and over classes (CAT-Seg, Cho et al., CVPR 2024, section 3.3).

Cost embeddings are (B, T, h, w, C): one map of C channels for each of the T classes of each of the B images.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from timm.layers import Mlp
from torch import Tensor, nn

__all__ = ["AggregationLayer", "ClassAggregation", "GuidedLinear", "SpatialAggregation", "in_chunks"]

_EPS = 1e-6


def in_chunks(function: Callable[[Tensor], Tensor], x: Tensor, dim: int, size: int) -> Tensor:
    """Apply a function to slices of a tensor, so that its intermediate results stay small.

    Args:
        function: from slices to results of the same length along ``dim``.
        x: the whole tensor.
        dim: dimension that is sliced.
        size: length of the slices; 0: the whole tensor at once.

    Returns:
        The results, concatenated along ``dim``.
    """
    if not size or x.shape[dim] <= size:
        return function(x)
    return torch.cat([function(part) for part in x.split(size, dim)], dim)


class GuidedLinear(nn.Linear):
    """Linear layer of the concatenation [x, guidance].

    The two parts of the weight are applied apart, so that guidance that many maps share is projected once.
    """

    def __init__(self, channels: int, guidance_channels: int, out_channels: int) -> None:
        super().__init__(channels + guidance_channels, out_channels)
        self.parts = [channels, guidance_channels]

    def forward(self, x: Tensor, guidance: Tensor | None = None) -> Tensor:
        """Project x (..., C) with guidance (..., G) that is broadcast to its leading dimensions."""
        own, shared = self.weight.split(self.parts, dim=1)
        y = F.linear(x, own, self.bias)
        return y if guidance is None or not self.parts[1] else y + F.linear(guidance, shared)


class WindowAttention(nn.Module):
    """Attention within the windows of a map; queries and keys see the image guidance as well."""

    def __init__(self, channels: int, guidance_channels: int, heads: int, window: int, shift: int) -> None:
        super().__init__()
        self.heads, self.window, self.shift = heads, window, shift
        self.q = GuidedLinear(channels, guidance_channels, channels)
        self.k = GuidedLinear(channels, guidance_channels, channels)
        self.v = nn.Linear(channels, channels)
        self.proj = nn.Linear(channels, channels)

    def forward(self, x: Tensor, guidance: Tensor) -> Tensor:
        """Attend within windows.

        Args:
            x: (B, T, h, w, C).
            guidance: (B, h, w, G).
        """
        h, w = x.shape[2:4]
        side = min(self.window, max(h, w))
        shift = self.shift if side < max(h, w) else 0
        guidance = guidance[:, None]
        q, k, v = (
            _windows(t, self.heads, side, shift)
            for t in (self.q(x, guidance), self.k(x, guidance), self.v(x))
        )
        mask = _window_mask((h, w), side, shift, x.device)
        if mask is not None:  # of each window, for each of its heads
            mask = mask.repeat_interleave(self.heads, dim=0)[None].to(q.dtype)
        y = F.scaled_dot_product_attention(q, k, v, mask)
        out: Tensor = self.proj(_from_windows(y, self.heads, side, shift, x.shape))
        return out


def _windows(x: Tensor, heads: int, side: int, shift: int) -> Tensor:
    """Split maps (B, T, h, w, C) to windows (B * T, windows * heads, side * side, C / heads), shifted."""
    h, w = x.shape[2:4]
    x = F.pad(x.flatten(0, 1), (0, 0, 0, -w % side, 0, -h % side))
    if shift:
        x = x.roll((-shift, -shift), dims=(1, 2))
    n, height, width, _ = x.shape
    x = x.reshape(n, height // side, side, width // side, side, heads, -1).permute(0, 1, 3, 5, 2, 4, 6)
    return x.flatten(4, 5).flatten(1, 3)


def _from_windows(y: Tensor, heads: int, side: int, shift: int, shape: torch.Size) -> Tensor:
    """Invert `_windows`: to maps (B, T, h, w, C) of a shape."""
    h, w = shape[2:4]
    rows, columns = -(-h // side), -(-w // side)
    y = y.reshape(y.shape[0], rows, columns, heads, side, side, -1).permute(0, 1, 4, 2, 5, 3, 6)
    y = y.reshape(y.shape[0], rows * side, columns * side, -1)
    if shift:
        y = y.roll((shift, shift), dims=(1, 2))
    return y[:, :h, :w].reshape(shape)


def _window_mask(grid: tuple[int, int], side: int, shift: int, device: torch.device) -> Tensor | None:
    """Forbid attention between positions that only the cyclic shift or the padding brings together.

    Returns:
        (windows, side * side, side * side), 0 or -100 (Liu et al., Swin Transformer, ICCV 2021); None if
        every position may attend to every position of its window.
    """
    h, w = grid
    height, width = h + -h % side, w + -w % side
    if not shift and (height, width) == grid:
        return None
    axes = []
    for length, padded in ((h, height), (w, width)):
        index = torch.arange(padded, device=device)
        part = (
            (index >= padded - side).long() + (index >= padded - shift) if shift else torch.zeros_like(index)
        )
        axes.append((part, (index < length).roll(-shift)))
    (rows, rows_inside), (columns, columns_inside) = axes
    parts = 3 * rows[:, None] + columns
    parts = parts.where(rows_inside[:, None] & columns_inside, -1)
    parts = parts.reshape(height // side, side, width // side, side).transpose(1, 2).flatten(2).flatten(0, 1)
    different = parts[:, :, None] != parts[:, None]
    return -100.0 * different.float()


class SwinBlock(nn.Module):
    """Pre-norm block of window attention with image guidance."""

    def __init__(self, channels: int, guidance_channels: int, heads: int, window: int, shift: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.attn = WindowAttention(channels, guidance_channels, heads, window, shift)
        self.norm2 = nn.LayerNorm(channels)
        self.mlp = Mlp(channels, 4 * channels)

    def forward(self, x: Tensor, guidance: Tensor) -> Tensor:
        """Update cost embeddings (B, T, h, w, C) with guidance (B, h, w, G)."""
        x = x + self.attn(self.norm1(x), guidance)
        y: Tensor = x + self.mlp(self.norm2(x))
        return y


class SpatialAggregation(nn.Module):
    """Two Swin blocks on the map of each class, the second with shifted windows."""

    def __init__(self, channels: int, guidance_channels: int, heads: int, window: int) -> None:
        """
        Args:
            channels: C.
            guidance_channels: G of the image guidance.
            heads: of the attention; divides C.
            window: side of the windows in positions. A grid that is not a multiple of it is padded.
        """
        super().__init__()
        self.guidance_norm = nn.LayerNorm(guidance_channels)
        self.blocks = nn.ModuleList(
            SwinBlock(channels, guidance_channels, heads, window, shift) for shift in (0, window // 2)
        )

    def forward(self, x: Tensor, guidance: Tensor, class_chunk: int = 0) -> Tensor:
        """Aggregate over space.

        Args:
            x: (B, T, h, w, C).
            guidance: (B, h, w, G).
            class_chunk: classes at a time; 0: all.
        """
        guidance = self.guidance_norm(guidance)

        def run(x: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x, guidance)
            return x

        return in_chunks(run, x, 1, class_chunk)


class ClassAggregation(nn.Module):
    """Linear attention among the classes at each position (Katharopoulos et al., ICML 2020).

    In published CAT-Seg the sequence of T classes is filled up to a fixed length with copies of one learned
    token. Their keys and values are equal, so they enter the sums over the sequence as one term.
    """

    def __init__(self, channels: int, guidance_channels: int, heads: int, pad_length: int = 0) -> None:
        """
        Args:
            channels: C.
            guidance_channels: G of the text guidance; 0: none (SED).
            heads: of the attention; divides C.
            pad_length: length that shorter sequences are filled up to; 0: no padding tokens (SED).
        """
        super().__init__()
        self.heads, self.pad_length = heads, pad_length
        self.norm1 = nn.LayerNorm(channels)
        self.q = GuidedLinear(channels, guidance_channels, channels)
        self.k = GuidedLinear(channels, guidance_channels, channels)
        self.v = nn.Linear(channels, channels)
        self.norm2 = nn.LayerNorm(channels)
        self.mlp = Mlp(channels, 4 * channels, act_layer=nn.ReLU)
        if pad_length:
            self.padding_tokens = nn.Parameter(torch.zeros(1, 1, channels))
            self.padding_guidance = nn.Parameter(torch.zeros(1, 1, guidance_channels))

    def forward(
        self, x: Tensor, guidance: Tensor | None, pooling: tuple[int, int] = (1, 1), class_chunk: int = 0
    ) -> Tensor:
        """Aggregate over classes, on pooled maps: x + upsample(aggregate(pool(x))).

        Args:
            x: (B, T, h, w, C).
            guidance: text guidance (B, T, G); None without one.
            pooling: height and width of the average pooling before the attention.
            class_chunk: number of maps whose tokens are processed at a time; 0: all.
        """
        batch, classes, h, w, _ = x.shape
        maps = x
        if tuple(pooling) != (1, 1):
            maps = F.avg_pool2d(x.flatten(0, 1).permute(0, 3, 1, 2), tuple(pooling)).permute(0, 2, 3, 1)
            maps = maps.unflatten(0, (batch, classes))
        rows = max(1, maps.shape[2] * class_chunk // classes) if class_chunk else 0
        tokens = maps.permute(0, 2, 3, 1, 4)  # (B, h', w', T, C)
        tokens = in_chunks(lambda part: self.aggregate(part, guidance), tokens, 1, rows)
        if maps.shape[2:4] == (h, w):
            return x + tokens.permute(0, 3, 1, 2, 4)

        def add(part: Tensor, low: Tensor) -> Tensor:
            low = low.permute(0, 3, 4, 1, 2).flatten(0, 1)
            high = F.interpolate(low, (h, w), mode="bilinear", align_corners=True)
            return part + high.permute(0, 2, 3, 1).unflatten(0, (batch, -1))

        step = class_chunk or classes
        return torch.cat(
            [add(*parts) for parts in zip(x.split(step, 1), tokens.split(step, 3), strict=True)], 1
        )

    def aggregate(self, tokens: Tensor, guidance: Tensor | None) -> Tensor:
        """Update the T classes (B, h, w, T, C) of each position with text guidance (B, T, G)."""
        guided = None if guidance is None else guidance[:, None, None]
        tokens = tokens + self._attend(self.norm1(tokens), guided)
        y: Tensor = tokens + self.mlp(self.norm2(tokens))
        return y

    def _attend(self, x: Tensor, guidance: Tensor | None) -> Tensor:
        """Compute phi(q) sum(phi(k) v) / phi(q) sum(phi(k)) with phi = elu + 1."""
        classes = x.shape[-2]
        length = max(classes, self.pad_length)
        q, k, v = self.q(x, guidance), self.k(x, guidance), self.v(x)
        q, k, v = (self._split(t) for t in (_feature(q), _feature(k), v / length))
        context = k.transpose(-1, -2) @ v  # (B, h, w, heads, d, d)
        total = k.sum(-2, keepdim=True)
        if length > classes:
            padding = self.norm1(self.padding_tokens)
            key = self._split(_feature(self.k(padding, self.padding_guidance)))
            value = self._split(self.v(padding) / length)
            context = context + (length - classes) * (key.transpose(-1, -2) @ value)
            total = total + (length - classes) * key
        y = (q @ context) / (q @ total.transpose(-1, -2) + _EPS) * length
        return y.transpose(-2, -3).flatten(-2)

    def _split(self, x: Tensor) -> Tensor:
        """Split (..., T, C) to heads (..., heads, T, d)."""
        return x.unflatten(-1, (self.heads, -1)).transpose(-2, -3)


def _feature(x: Tensor) -> Tensor:
    return F.elu(x) + 1


class AggregationLayer(nn.Module):
    """Spatial aggregation, then class aggregation."""

    def __init__(
        self,
        channels: int,
        image_guidance: int,
        text_guidance: int,
        heads: int,
        window: int,
        pad_length: int,
    ) -> None:
        super().__init__()
        self.spatial = SpatialAggregation(channels, image_guidance, heads, window)
        self.classes = ClassAggregation(channels, text_guidance, heads, pad_length)

    def forward(
        self,
        x: Tensor,
        image_guidance: Tensor,
        text_guidance: Tensor,
        pooling: tuple[int, int],
        class_chunk: int = 0,
    ) -> Tensor:
        """Aggregate cost embeddings (B, T, h, w, C); see the two parts."""
        x = self.spatial(x, image_guidance, class_chunk)
        y: Tensor = self.classes(x, text_guidance, pooling, class_chunk)
        return y
