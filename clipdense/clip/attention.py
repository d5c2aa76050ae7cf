"""One view of a transformer block, and the table of last-block modes that dense CLIP methods use.

A mode is a small function of (block view, token stream), so modes x tower families is a sum, not a product.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from clipdense.clip.position import Grid, rotate


@dataclass
class TokenStream:
    """The tokens between two blocks.

    Attributes:
        x: (B, L, C). Patch tokens are the last h * w, row-major; the class token, if the tower has one, is
            the first.
        grid: (h, w) of the patch tokens.
        rope: sine and cosine (h * w, head_dim) that rotate queries and keys of patch tokens.
        bias: added to the attention logits, broadcastable to (B, heads, L, L); -inf forbids. None: all
            attend to all.
        causal: every token attends only to itself and its predecessors (text); excludes a bias.
        window: side in patches of the windows that patch tokens attend within (and to the tokens before
            them); 0: the whole grid. Excludes a bias.
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


class Block(ABC):
    """A residual block as x + out(attention(q, k, v)), then x + mlp(x), whatever library built it.

    Norms, layer scales and stochastic depth belong to the methods, so that post-norm blocks have the same
    view.
    """

    heads: int
    dropout: float = 0.0

    @abstractmethod
    def normed(self, x: Tensor) -> Tensor:
        """What the attention reads: (B, L, C)."""

    @abstractmethod
    def qkv(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value projections of normed tokens, heads side by side: each (B, L, C)."""

    @abstractmethod
    def key(self, u: Tensor) -> Tensor:
        """The key projection alone."""

    @abstractmethod
    def value(self, u: Tensor) -> Tensor:
        """The value projection alone."""

    @abstractmethod
    def out(self, y: Tensor) -> Tensor:
        """From the attention's result to what it adds to the residual: inner norm, output projection, layer
        scale.
        """

    @abstractmethod
    def mlp(self, x: Tensor) -> Tensor:
        """What the MLP adds to the residual, its norm included."""

    def norm_heads(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Per-head norms of queries and keys (B, heads, L, head_dim); none by default."""
        return q, k

    def attend(self, q: Tensor, k: Tensor, v: Tensor, stream: TokenStream) -> Tensor:
        """Softmax attention (B, L, C) over the stream's tokens."""
        q, k, v = (t.reshape(*t.shape[:2], self.heads, -1).transpose(1, 2) for t in (q, k, v))
        q, k = self.norm_heads(q, k)
        if stream.rope is not None:
            q, k = _rotate_patches(q, stream), _rotate_patches(k, stream)
        if stream.bias is not None and (stream.causal or stream.window):
            raise ValueError("an attention bias cannot be combined with causal or windowed attention")
        if stream.window:
            y = _attend_in_windows(q, k, v, stream.grid, stream.window, self.dropout)
        else:
            bias = None if stream.bias is None else stream.bias.to(q.dtype)
            y = F.scaled_dot_product_attention(q, k, v, bias, self.dropout, is_causal=stream.causal)
        return y.transpose(1, 2).flatten(2)


def _rotate_patches(x: Tensor, stream: TokenStream) -> Tensor:
    assert stream.rope is not None
    prefix = x.shape[2] - stream.grid[0] * stream.grid[1]
    return torch.cat([x[:, :, :prefix], rotate(x[:, :, prefix:], stream.rope)], dim=2)


def _attend_in_windows(q: Tensor, k: Tensor, v: Tensor, grid: Grid, side: int, dropout: float) -> Tensor:
    """Patches attend to their window and to the prefix tokens; prefix tokens attend to all. Edge windows are
    cut short.
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


Mode = Callable[[Block, TokenStream], Tensor]
MODES: dict[str, Mode] = {}
CLASS_TOKEN_MODES: set[str] = set()


def dense_mode(*names: str, class_token: bool = False) -> Callable[[Mode], Mode]:
    """Register a last-block mode: from the stream that enters the last block to the tokens (B, L, C) that
    leave it.

    Args:
        names: what the methods that share the mode call it.
        class_token: the mode reads the class token, so towers without one do not have it.
    """

    def register(mode: Mode) -> Mode:
        MODES.update(dict.fromkeys(names, mode))
        CLASS_TOKEN_MODES.update(names if class_token else ())
        return mode

    return register


def get_mode(name: str) -> Mode:
    """A last-block mode by name.

    Raises:
        ValueError: unknown mode.
    """
    if name not in MODES:
        raise ValueError(f"unknown last-block mode '{name}'; known: {', '.join(MODES)}")
    return MODES[name]


@dense_mode("plain")
def plain(block: Block, stream: TokenStream) -> Tensor:
    """The block as CLIP trained it."""
    x = stream.x
    x = x + block.out(block.attend(*block.qkv(block.normed(x)), stream))
    return x + block.mlp(x)


@dense_mode("value", "clipself", "maskclip")
def value(block: Block, stream: TokenStream) -> Tensor:
    """Each token attends to itself alone: x + out(v), then the MLP; residual, inner norm and MLP are kept.

    MaskCLIP (specs/denseclip_maskclip_segclip.md 2.1) for CLIP's blocks, CLIPSelf
    (specs/clipself_fvlm_catseg_odise_fcclip.md 1.2) also for EVA's, whose inner norm stands before the
    projection.
    """
    x = stream.x
    x = x + block.out(block.value(block.normed(x)))
    return x + block.mlp(x)


@dense_mode("catseg", class_token=True)
def catseg(block: Block, stream: TokenStream) -> Tensor:
    """As `value`, but the residual of every token is the class token (CAT-Seg,
    specs/clipself_fvlm_catseg_odise_fcclip.md 3.1).
    """
    x = stream.x[:, :1] + block.out(block.value(block.normed(stream.x)))
    return x + block.mlp(x)
