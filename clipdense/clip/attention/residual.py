"""ResCLIP: the last block borrows the attention of middle blocks, and a first segmentation steers it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from clipdense.clip.attention.block import History, TokenStream
from clipdense.clip.attention.calibration import DEPTH
from clipdense.clip.attention.correlation import finish, gaussian_window
from clipdense.clip.attention.mode import dense_mode

FEEDBACK = "attention (B, L, L) or (L, L) between all tokens, from `semantic_feedback`"
BASES = ("naclip", "clearclip", "sclip", "plain")
"""Attentions that ResCLIP refines: k k with the Gaussian window, q q, q q + k k, and q k."""


@dense_mode("rcs", reads_history=True)
def rcs(
    history: History,
    *,
    base: str = "naclip",
    full: bool = False,
    gaussian_std: float = 5.0,
    cross: tuple[float, float] | None = (2.0, 0.3),
    blocks: tuple[int, ...] | None = None,
) -> TokenStream:
    """Mix the attention of middle blocks into the last block's: tau ((1 - lambda) A + lambda R).

    Args:
        history: the forward up to the last block.
        base: the last block's attention, one of `BASES`.
        full: keep residual and MLP.
        gaussian_std: of "naclip", in patches.
        cross: tau and lambda of R, the mean attention of the middle blocks; None leaves R out.
        blocks: indices of the middle blocks; those that the tower does not have are left out. None: the
            published 5 to 8 of 12, scaled to the depth of the tower.

    Raises:
        ValueError: If the base is unknown, or the tower has none of the blocks.

    Source: ResCLIP (Yang et al., CVPR 2025), section 3.2.
    """
    return _attend(history, None, base, full, gaussian_std, cross, blocks, None)


@dense_mode("resclip", guidance=FEEDBACK, reads_history=True)
def resclip(
    history: History,
    feedback: Tensor,
    *,
    base: str = "naclip",
    full: bool = False,
    gaussian_std: float = 5.0,
    cross: tuple[float, float] | None = (2.0, 0.3),
    blocks: tuple[int, ...] | None = None,
    semantic: tuple[float, float] = (2.1, 0.7),
) -> TokenStream:
    """Run `rcs` with logits tau ((1 - lambda) logits + lambda B) that a first segmentation has steered.

    Args:
        history: the forward up to the last block.
        feedback: B, (B, L, L) or (L, L), from `semantic_feedback`.
        base: see `rcs`.
        full: see `rcs`.
        gaussian_std: see `rcs`.
        cross: see `rcs`.
        blocks: see `rcs`.
        semantic: tau and lambda of the feedback.

    Source: ResCLIP (Yang et al., CVPR 2025), section 3.3.
    """
    return _attend(history, feedback, base, full, gaussian_std, cross, blocks, semantic)


def _attend(
    history: History,
    feedback: Tensor | None,
    base: str,
    full: bool,
    gaussian_std: float,
    cross: tuple[float, float] | None,
    blocks: tuple[int, ...] | None,
    semantic: tuple[float, float] | None,
) -> TokenStream:
    if base not in BASES:
        raise ValueError(f"unknown base '{base}'; known: {', '.join(BASES)}")
    block, stream = history.block, history.stream
    q, k, v = block.split_heads(*block.qkv(block.normed(stream.x)), stream)
    pairs = {"naclip": [(k, k)], "clearclip": [(q, q)], "sclip": [(q, q), (k, k)], "plain": [(q, k)]}[base]
    weights = torch.zeros_like(q @ k.transpose(2, 3))
    for left, right in pairs:
        logits = left @ right.transpose(2, 3) * q.shape[-1] ** -0.5
        if feedback is not None and semantic is not None:
            tau, share = semantic
            mixed = feedback.to(logits) if feedback.dim() == 2 else feedback.to(logits)[:, None]
            logits = tau * ((1 - share) * logits + share * mixed)
        if base == "naclip":
            logits = logits + gaussian_window(stream.grid, stream.x.shape[1], gaussian_std).to(logits)
        weights = weights + logits.softmax(-1)
    if cross is not None:
        tau, share = cross
        weights = tau * ((1 - share) * weights + share * middle_attention(history, blocks))
    return finish(block, stream, (weights @ v).transpose(1, 2).flatten(2), full)


def middle_attention(history: History, blocks: tuple[int, ...] | None) -> Tensor:
    """Return the mean attention (B, heads, L, L) of blocks, see `rcs`.

    Raises:
        ValueError: If the tower has none of the blocks before its last one.
    """
    last = len(history) - 1
    if blocks is None:
        blocks = tuple(dict.fromkeys(min(round(i * len(history) / DEPTH), last - 1) for i in (5, 6, 7, 8)))
    present = [i for i in blocks if 0 <= i < last]
    if not present:
        raise ValueError(f"blocks {blocks}: the tower has {len(history)} blocks, the last one not counted")
    return torch.stack([history.weights(i) for i in present]).mean(0)


def semantic_feedback(
    patch_classes: Tensor,
    prefix: int = 1,
    *,
    std: float = 5.0,
    decay: bool = True,
    whole_path: bool = True,
    half_precision: bool = False,
) -> Tensor:
    """Compute the attention that a segmentation of the patches suggests.

    Two patches of one class attend to each other; the weight of a pair decays with its distance where the
    straight path between the two leaves the class. Rows are smoothed by a 1-D Gaussian over the flattened
    patches and divided by their sum, and the result by its maximum.

    Args:
        patch_classes: (h, w) int64.
        prefix: number of tokens before the patches, whose rows and columns are 0.
        std: of the smoothing, in patches.
        decay: whether weights decay.
        whole_path: test the whole path of a pair. The released code samples the path as finely as that of the
            longest pair, but as often as the pair is long, so that it tests the first part only.
        half_precision: round the result to float16, as the released code does.

    Returns:
        (prefix + h w, prefix + h w) float32.

    Source: ResCLIP (Yang et al., CVPR 2025), section 3.3.
    """
    result = raw_feedback(patch_classes, std=std, decay=decay, whole_path=whole_path)
    result = result / result.max()
    result = result.half().float() if half_precision else result
    return F.pad(result, (prefix, 0, prefix, 0))


def raw_feedback(
    patch_classes: Tensor, *, std: float = 5.0, decay: bool = True, whole_path: bool = True
) -> Tensor:
    """Return `semantic_feedback` before its maximum becomes 1, for the patches only: (h w, h w)."""
    labels = patch_classes.flatten()
    weights = (labels[:, None] == labels[None]).float()
    if decay:
        connected, distance = _connections(patch_classes, whole_path)
        longest = max(int(max(patch_classes.shape)) - 1, 1)
        weights = torch.where(connected, weights, weights * (-distance.float() / longest).exp())
    size = min(len(labels), int(6 * std + 1))
    size += 1 - size % 2
    kernel = (-(torch.arange(size) - size // 2).float().square() / (2 * std**2)).exp().to(weights)
    smooth = F.conv1d(weights[:, None], (kernel / kernel.sum())[None, None], padding=size // 2)[:, 0].relu()
    return smooth / (smooth.sum(1, keepdim=True) + 1e-8)


def _connections(patch_classes: Tensor, whole_path: bool) -> tuple[Tensor, Tensor]:
    """Return which pairs of patches a path of one class connects, and their Chebyshev distances (N, N)."""
    h, w = patch_classes.shape
    device = patch_classes.device
    rows, columns = torch.meshgrid(*(torch.arange(n, device=device) for n in (h, w)), indexing="ij")
    places = torch.stack([rows.flatten(), columns.flatten()], 1).float()
    start, end = places[:, None], places[None]
    distance = (start - end).abs().amax(2)
    longest = max(h, w) - 1
    steps = torch.linspace(0, 1, longest + 1, device=device)
    labels = patch_classes.flatten()
    connected = torch.ones_like(distance, dtype=torch.bool)
    for t in range(longest + 1):
        tau = (t / distance.clamp(min=1)).clamp(max=1)[..., None] if whole_path else steps[t]
        y, x = (start * (1 - tau) + end * tau).round().long().unbind(2)
        same = patch_classes[y, x] == labels[:, None]
        connected &= same | (t > distance)
    return connected, distance
