"""Modes whose last block attends by the similarity of tokens in one projection (q q, k k, v v).

With u = norm(x) and the projections q, k, v of u, a mode is

    y = out(A v),    full: z = x + y, z + mlp(z);    bare: y

and the modes differ in the weights A (rows are queries) and in full or bare.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from clipdense.clip.attention.block import Block, HeadTensors, History, TokenStream
from clipdense.clip.attention.mode import dense_mode
from clipdense.clip.position import Grid

ATTENTIONS = ("qk", "qq", "kk", "vv", "qq+kk", "kk+gauss", "gauss", "value")
"""Weights A of `correlate`."""


def correlate(
    block: Block, stream: TokenStream, attention: str, *, full: bool, gaussian_std: float = 5.0
) -> TokenStream:
    """Run the last block with other attention weights.

    Args:
        block: view of the last block.
        stream: tokens that enter it. All of them are queries, keys and values, the class token too.
        attention: one of `ATTENTIONS`. "qq+kk" is the sum of two softmaxes, whose rows sum to 2; "kk+gauss"
            adds `gaussian_window` to the logits; "gauss" is the softmax of the window alone, times the mean
            of s |q| |k| over heads and token pairs; "value" is the identity.
        full: keep the residual and the MLP of the block; otherwise the result of the attention alone.
        gaussian_std: standard deviation of the window in patches.

    Raises:
        ValueError: If the attention is unknown.
    """
    if attention not in ATTENTIONS:
        raise ValueError(f"unknown attention '{attention}'; known: {', '.join(ATTENTIONS)}")
    if attention == "value":
        return finish(block, stream, block.value(block.normed(stream.x)), full)
    y = attend(block, stream, attention, gaussian_std=gaussian_std)
    return finish(block, stream, y.transpose(1, 2).flatten(2), full)


def attend(
    block: Block,
    stream: TokenStream,
    attention: str,
    values: Tensor | None = None,
    *,
    gaussian_std: float = 5.0,
) -> Tensor:
    """Sum values by the weights of an attention of the last block: A v of the module's formula, per head.

    Args:
        block: view of the last block.
        stream: tokens that enter it.
        attention: one of `ATTENTIONS`, see `correlate`; not "value".
        values: (B, heads or 1, L, D) in place of the block's own, such as the labels of the tokens.
        gaussian_std: see `correlate`.

    Returns:
        (B, heads, L, D).
    """
    heads = block.split_heads(*block.qkv(block.normed(stream.x)), stream)
    bias = stream.bias
    if "gauss" in attention:
        window = gaussian_window(stream.grid, stream.x.shape[1], gaussian_std).to(stream.x)
        window = window * _strength(heads) if attention == "gauss" else window
        bias = window if bias is None else bias + window
    q, k, v = heads
    if attention == "gauss":
        q = torch.zeros_like(q)
    parts = {"q": q, "k": k, "v": v}
    pairs = ["qk"] if attention == "gauss" else [pair for pair in attention.split("+") if pair != "gauss"]
    values = v if values is None else values.expand(*v.shape[:3], -1)
    results = [F.scaled_dot_product_attention(parts[pair[0]], parts[pair[1]], values, bias) for pair in pairs]
    return torch.stack(results).sum(0) if len(results) > 1 else results[0]


def finish(block: Block, stream: TokenStream, y: Tensor, full: bool) -> TokenStream:
    """Apply the output projection to the result of the attention, and with ``full`` residual and MLP."""
    y = block.out(y)
    if not full:
        return replace(stream, x=y)
    x = stream.x + y
    return replace(stream, x=x + block.mlp(x))


def gaussian_window(grid: Grid, length: int, std: float) -> Tensor:
    """Compute exp(-d^2 / (2 std^2)) of the distance d of two patches, for the logits of the attention.

    Args:
        grid: (h, w) of the patches.
        length: L, number of tokens; those before the patches have rows and columns of zeros.
        std: in patches.

    Returns:
        (L, L), 1 on the diagonal of the patches; not normalised.

    Source: NACLIP (Hajimiri et al., WACV 2025), section 3.3.
    """
    rows, columns = torch.meshgrid(*(torch.arange(n, dtype=torch.float32) for n in grid), indexing="ij")
    places = torch.stack([rows.flatten(), columns.flatten()], 1)
    squared = (places[:, None] - places[None]).square().sum(2)
    prefix = length - places.shape[0]
    return F.pad((-squared / (2 * std**2)).exp(), (prefix, 0, prefix, 0))


def _strength(heads: HeadTensors) -> Tensor:
    """Return s times the mean of |q_i| |k_j| over heads and token pairs: (B, 1, 1, 1)."""
    q, k, _ = heads
    product = q.norm(dim=3).mean(2) * k.norm(dim=3).mean(2)  # (B, heads)
    strength: Tensor = product.mean(1)[:, None, None, None] * q.shape[-1] ** -0.5
    return strength


@dense_mode("correlation")
def correlation(
    block: Block,
    stream: TokenStream,
    *,
    attention: str = "qk",
    full: bool = True,
    gaussian_std: float = 5.0,
) -> TokenStream:
    """Run `correlate`, for sweeps over its arguments."""
    return correlate(block, stream, attention, full=full, gaussian_std=gaussian_std)


@dense_mode("sclip")
def sclip(block: Block, stream: TokenStream, *, full: bool = True) -> TokenStream:
    """Attend by softmax(s q q^T) + softmax(s k k^T).

    Source: SCLIP (Wang et al., ECCV 2024); the released code adds the two and does not halve the sum.
    """
    return correlate(block, stream, "qq+kk", full=full)


@dense_mode("clearclip", reads_history=True)
def clearclip(history: History, *, full: bool = False, last_layers: int = 1) -> TokenStream:
    """Attend by softmax(s q q^T), without residual and MLP.

    Args:
        history: the forward up to the last block.
        full: keep residual and MLP.
        last_layers: sum the results of so many last blocks, each computed from the ordinary stream.

    Raises:
        ValueError: If there are fewer blocks.

    Source: ClearCLIP (Lan et al., ECCV 2024).
    """
    if not 1 <= last_layers <= len(history):
        raise ValueError(f"last_layers must be 1 to {len(history)}, the number of blocks, not {last_layers}")
    streams = [
        correlate(block, stream, "qq", full=full)
        for block, stream in zip(history.blocks[-last_layers:], history.streams[-last_layers:], strict=True)
    ]
    return replace(streams[-1], x=torch.stack([stream.x for stream in streams]).sum(0))


@dense_mode("naclip")
def naclip(
    block: Block, stream: TokenStream, *, gaussian_std: float = 5.0, full: bool = False
) -> TokenStream:
    """Attend by softmax(s k k^T + G) with the Gaussian window G, without residual and MLP.

    Source: NACLIP (Hajimiri et al., WACV 2025), section 3.
    """
    return correlate(block, stream, "kk+gauss", full=full, gaussian_std=gaussian_std)


@dense_mode("gem", reads_history=True)
def gem(
    history: History,
    *,
    blocks: int = 6,
    iterations: int = 1,
    temperature: float | None = None,
    residual: bool = True,
) -> TokenStream:
    """Add the self-self attention of the last blocks, computed from the ordinary stream x.

    For t in q, k, v: t <- t / |t|, then so many ``iterations`` of t <- softmax(tau t t^T) t and t <- t / |t|,
    and r_t = softmax(tau t t^T) v. The stream of the result gains out(mean of r_q, r_k, r_v) in every block.

    Args:
        history: the forward up to the last block.
        blocks: number of last blocks; all blocks if there are fewer.
        iterations: see above.
        temperature: tau; None: s times the mean of |u| over the tokens, one number per image.
        residual: False keeps the result of the last block only.

    Source: GEM (Bousselham et al., CVPR 2024), section 3.
    """
    first = max(len(history) - blocks, 0)
    y = history.streams[first].x if residual else torch.zeros_like(history.stream.x)
    for i in range(first if residual else len(history) - 1, len(history)):
        y = y + _self_self(history.blocks[i], history.streams[i], iterations, temperature)
    return replace(history.stream, x=y)


def _self_self(block: Block, stream: TokenStream, iterations: int, temperature: float | None) -> Tensor:
    u = block.normed(stream.x)
    q, k, v = block.split_heads(*block.qkv(u), stream)
    tau: Tensor | float = u.norm(dim=2).mean(1)[:, None, None, None] * q.shape[-1] ** -0.5
    tau = tau if temperature is None else temperature
    total = torch.zeros_like(v)
    for t in (q, k, v):
        t = F.normalize(t, dim=3)
        for _ in range(iterations):
            t = F.normalize((tau * t @ t.transpose(2, 3)).softmax(3) @ t, dim=3)
        total = total + (tau * t @ t.transpose(2, 3)).softmax(3) @ v
    return block.out((total / 3).transpose(1, 2).flatten(2))
