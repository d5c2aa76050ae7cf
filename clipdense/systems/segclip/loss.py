"""SegCLIP's superpixel loss, and the superpixels of patches."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["patch_segments", "superpixel_loss", "superpixel_means"]


def superpixel_means(assignment: Tensor, segments: Tensor) -> Tensor:
    """Average the assignments of the patches of each superpixel.

    Args:
        assignment: M (B, L, G).
        segments: superpixel of each patch (B, L), any integers; compared within an image only.

    Returns:
        (B, L, G), the mean of the superpixel of each patch.
    """
    same = (segments[:, :, None] == segments[:, None, :]).to(assignment.dtype)
    return same @ assignment / same.sum(2, keepdim=True)


def superpixel_loss(assignment: Tensor, segments: Tensor) -> Tensor:
    """Compute the symmetric KL divergence between assignments M and their superpixel means M'.

    0.5 [KL(softmax M' || softmax M) + KL(softmax M || softmax M')], both summed and divided by B * L * G.
    Gradients flow to M and M'.

    Args:
        assignment: M (B, L, G), one-hot.
        segments: (B, L), see `superpixel_means`.

    Source: Luo et al., SegCLIP, ICML 2023, section 3.3.
    """
    return 0.5 * divergences(assignment, segments).sum() / assignment.numel()


def divergences(assignment: Tensor, segments: Tensor) -> Tensor:
    """Return the summed KL(softmax M' || softmax M) and KL(softmax M || softmax M'), (2,)."""
    means = superpixel_means(assignment, segments)
    log_m, log_mean = assignment.log_softmax(-1), means.log_softmax(-1)
    return torch.stack(
        [(log_mean.exp() * (log_mean - log_m)).sum(), (log_m.exp() * (log_m - log_mean)).sum()]
    )


def patch_segments(segments: Tensor, patch: int, rule: str = "majority") -> Tensor:
    """Choose the superpixel of each patch from a map of superpixels.

    Args:
        segments: (H, W) int64, at least 0.
        patch: side of a patch in pixels.
        rule: "majority", the most frequent superpixel; or "mean", the mean of the numbers, rounded down, as
            in the published code, where patches at borders can get the number of a third superpixel.

    Returns:
        (h * w,) int64, row-major.

    Raises:
        ValueError: If the rule is unknown.
    """
    height, width = segments.shape[0] // patch, segments.shape[1] // patch
    cells = segments[: height * patch, : width * patch].reshape(height, patch, width, patch)
    cells = cells.permute(0, 2, 1, 3).flatten(2).flatten(0, 1)
    if rule == "mean":
        return cells.double().mean(1).long()
    if rule != "majority":
        raise ValueError(f"INPUT.SEGCLIP.PATCH_LABEL must be majority or mean, not {rule!r}")
    return cells.mode(1).values
