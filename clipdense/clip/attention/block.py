"""The view of a transformer block, the tokens that run through it, and the history of a forward."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipdense.clip.position import Grid, rotate

HeadTensors = tuple[Tensor, Tensor, Tensor]
"""Queries, keys and values, each (B, heads, L, head_dim)."""


@dataclass
class TokenStream:
    """Tokens between two blocks.

    Attributes:
        x: (B, L, C). Patch tokens are the last h * w, row-major; the class token, if the tower has one, is
            the first.
        grid: (h, w) of the patch tokens.
        rope: sine and cosine (h * w, head_dim) that rotate queries and keys of patch tokens.
        bias: added to the attention logits, broadcastable to (B, heads, L, L); -inf forbids attention. None:
            every token attends to every token.
        causal: every token attends only to itself and its predecessors (text). Cannot be combined with a
            bias.
        window: side, in patches, of the windows that patch tokens attend within (and to the tokens before
            the patches). 0: the whole grid. Cannot be combined with a bias.
    """

    x: Tensor
    grid: Grid
    rope: tuple[Tensor, Tensor] | None = None
    bias: Tensor | None = None
    causal: bool = False
    window: int = 0

    @property
    def patches(self) -> Tensor:
        """(B, h * w, C)."""
        return self.x[:, self.x.shape[1] - self.grid[0] * self.grid[1] :]


@dataclass(frozen=True)
class ParameterRows:
    """Rows of a parameter, along its first dimension.

    Attributes:
        parameter: the parameter.
        rows: range of rows; None for the whole parameter.
    """

    parameter: nn.Parameter
    rows: slice | None = None


@dataclass(frozen=True)
class AttentionParameters:
    """Weights and biases of the query, key and value projections of one attention.

    Where a library keeps the three projections in one tensor, each part is a range of its rows.
    """

    q: tuple[ParameterRows, ...]
    k: tuple[ParameterRows, ...]
    v: tuple[ParameterRows, ...]

    @classmethod
    def from_linears(cls, q: nn.Module, k: nn.Module, v: nn.Module) -> AttentionParameters:
        """Collect the parameters of three separate projections."""
        return cls(*(tuple(ParameterRows(p) for p in part.parameters()) for part in (q, k, v)))

    @classmethod
    def from_fused(cls, *fused: nn.Parameter | None) -> AttentionParameters:
        """Split parameters whose rows are queries, keys and values, a third each."""
        return cls(*(row_parts(fused, i, 3) for i in range(3)))


def row_parts(parameters: Iterable[nn.Parameter | None], index: int, count: int) -> tuple[ParameterRows, ...]:
    """Return the part `index` of `count` equal parts of the rows of each parameter."""
    return tuple(
        ParameterRows(p, slice(index * len(p) // count, (index + 1) * len(p) // count))
        for p in parameters
        if p is not None
    )


class Block(ABC):
    """View of a residual block: x + out(attention(q, k, v)), then x + mlp(x), for any library's block.

    Norms, layer scales and stochastic depth belong to the methods, so that post-norm blocks have the same
    view.
    """

    heads: int
    dropout: float = 0.0

    @abstractmethod
    def normed(self, x: Tensor) -> Tensor:
        """Norm tokens (B, L, C) for the attention."""

    @abstractmethod
    def qkv(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Project normed tokens to queries, keys and values, heads side by side: each (B, L, C)."""

    @abstractmethod
    def key(self, u: Tensor) -> Tensor:
        """Project normed tokens to keys (B, L, C)."""

    @abstractmethod
    def value(self, u: Tensor) -> Tensor:
        """Project normed tokens to values (B, L, C)."""

    @abstractmethod
    def out(self, y: Tensor) -> Tensor:
        """Map the attention's result to its residual branch: inner norm, output projection, layer scale."""

    @abstractmethod
    def mlp(self, x: Tensor) -> Tensor:
        """Compute the residual branch of the MLP, its norm included."""

    @abstractmethod
    def attention_parameters(self) -> AttentionParameters:
        """Return the parameters of the query, key and value projections."""

    def norm_heads(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Norm queries and keys (B, heads, L, head_dim) per head; the default returns them unchanged."""
        return q, k

    def split_heads(self, q: Tensor, k: Tensor, v: Tensor, stream: TokenStream) -> HeadTensors:
        """Split projections (B, L, C) into heads (B, heads, L, head_dim); norm and rotate queries and keys.

        Args:
            q: queries of the stream's tokens, or of its patches only; k and v of the same tokens.
            k: keys.
            v: values.
            stream: the tokens, for their grid and RoPE.
        """
        q, k, v = (t.reshape(*t.shape[:2], self.heads, -1).transpose(1, 2) for t in (q, k, v))
        q, k = self.norm_heads(q, k)
        if stream.rope is not None:
            q, k = _rotate_patches(q, stream), _rotate_patches(k, stream)
        return q, k, v

    def attend(self, q: Tensor, k: Tensor, v: Tensor, stream: TokenStream) -> Tensor:
        """Compute softmax attention (B, L, C) over the stream's tokens.

        Raises:
            ValueError: If the stream has a bias and is causal or windowed.
        """
        q, k, v = self.split_heads(q, k, v, stream)
        if stream.bias is not None and (stream.causal or stream.window):
            raise ValueError("an attention bias cannot be combined with causal or windowed attention")
        if stream.window:
            y = _attend_in_windows(q, k, v, stream.grid, stream.window, self.dropout)
        else:
            bias = None if stream.bias is None else stream.bias.to(q.dtype)
            y = _softmax_attention(q, k, v, bias, self.dropout, stream.causal)
        return y.transpose(1, 2).flatten(2)


def _softmax_attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, dropout: float, causal: bool
) -> Tensor:
    """Compute torch's attention; under autocast on a CPU in float32, as its bfloat16 backward is slow."""
    if q.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
        with torch.autocast("cpu", enabled=False):
            bias = None if bias is None else bias.float()
            y = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), bias, dropout, causal)
        return y.to(v.dtype)
    return F.scaled_dot_product_attention(q, k, v, bias, dropout, causal)


def _rotate_patches(x: Tensor, stream: TokenStream) -> Tensor:
    assert stream.rope is not None
    prefix = x.shape[2] - stream.grid[0] * stream.grid[1]
    return torch.cat([x[:, :, :prefix], rotate(x[:, :, prefix:], stream.rope)], dim=2)


def _attend_in_windows(q: Tensor, k: Tensor, v: Tensor, grid: Grid, side: int, dropout: float) -> Tensor:
    """Attend within windows: patches see their window and the prefix tokens, prefix tokens see all tokens.

    Windows at the edge are smaller.
    """
    (h, w), (batch, heads, length, _) = grid, q.shape
    prefix = length - h * w
    down, right = -h % side, -w % side
    rows, columns = (h + down) // side, (w + right) // side

    def windows(x: Tensor) -> Tensor:  # (B, heads, h * w, d) -> (B * rows * columns, heads, side * side, d)
        x = F.pad(x.reshape(*x.shape[:2], h, w, -1), (0, 0, 0, right, 0, down))
        x = x.reshape(*x.shape[:2], rows, side, columns, side, -1).permute(0, 2, 4, 1, 3, 5, 6)
        return x.flatten(4, 5).flatten(0, 2)

    def with_prefix(x: Tensor) -> Tensor:
        shared = x[:, :, :prefix].repeat_interleave(rows * columns, 0)
        return torch.cat([shared, windows(x[:, :, prefix:])], dim=2)

    inside = F.pad(windows(q.new_ones(1, 1, h * w, 1)), (0, 0, prefix, 0), value=1.0)
    mask = (inside > 0).transpose(2, 3).repeat(batch, 1, 1, 1) if down or right else None
    queries = windows(q[:, :, prefix:])
    y = F.scaled_dot_product_attention(queries, with_prefix(k), with_prefix(v), mask, dropout)
    y = y.reshape(batch, rows, columns, heads, side, side, -1).permute(0, 3, 1, 4, 2, 5, 6)
    y = y.flatten(4, 5).flatten(2, 3)[:, :, :h, :w].flatten(2, 3)
    return torch.cat([F.scaled_dot_product_attention(q[:, :, :prefix], k, v, None, dropout), y], dim=2)


@dataclass(frozen=True)
class History:
    """What a forward leaves behind when it stops in front of the last block.

    Attributes:
        blocks: views of all blocks, first to last.
        streams: the stream that enters each block, first to last.
    """

    blocks: Sequence[Block]
    streams: Sequence[TokenStream]

    def __len__(self) -> int:
        return len(self.blocks)

    @property
    def block(self) -> Block:
        """View of the last block."""
        return self.blocks[-1]

    @property
    def stream(self) -> TokenStream:
        """Stream that enters the last block."""
        return self.streams[-1]

    def output(self, index: int) -> Tensor:
        """Return the tokens (B, L, C) that leave a block, 0-based; the last block has not run.

        Raises:
            ValueError: If the forward has no such block, or it is the last one.
        """
        if not 0 <= index < len(self) - 1:
            raise ValueError(
                f"block {index}: a history of {len(self)} blocks has outputs 0 to {len(self) - 2}"
            )
        return self.streams[index + 1].x

    def weights(self, index: int) -> Tensor:
        """Compute the softmax attention (B, heads, L, L) of a block."""
        block, stream = self.blocks[index], self.streams[index]
        q, k, _ = block.split_heads(*block.qkv(block.normed(stream.x)), stream)
        logits = q @ k.transpose(2, 3) * q.shape[-1] ** -0.5
        weights: Tensor = (logits if stream.bias is None else logits + stream.bias).softmax(-1)
        return weights
