"""Binary cross-entropy of class maps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["IgnoredPixels", "class_map_loss"]

IgnoredPixels = Literal["excluded", "negative"]


def class_map_loss(
    logits: Tensor, labels: Sequence[Tensor], ignore_label: int, ignored: IgnoredPixels = "excluded"
) -> Tensor:
    """Compute the mean binary cross-entropy over pixels and classes.

    Logits are resized bilinearly to the labels. The targets are never expanded to one map per class.

    Args:
        logits: (B, T, h, w).
        labels: B label maps (H, W), int64; sizes may differ.
        ignore_label: label of pixels without annotation.
        ignored: "excluded" leaves these pixels out; "negative" counts them as pixels of no class, as
            published CAT-Seg and SED do.

    Raises:
        ValueError: If ``ignored`` is unknown.
    """
    if ignored not in get_args(IgnoredPixels):
        raise ValueError(
            f"ignored pixels must be one of {', '.join(get_args(IgnoredPixels))}, not {ignored!r}"
        )
    total, count = logits.new_zeros((), dtype=torch.float32), logits.new_zeros((), dtype=torch.long)
    for maps, target in zip(logits, labels, strict=True):
        maps = F.interpolate(maps[None], target.shape, mode="bilinear", align_corners=False)[0].float()
        known = target != ignore_label
        true = maps.gather(0, target.where(known, 0)[None])[0]  # logit of the true class
        loss = F.softplus(maps).sum(0) - true * known
        if ignored == "excluded":
            loss = loss * known
            count = count + known.sum() * len(maps)
        else:
            count = count + maps.numel()
        total = total + loss.sum()
    return total / count.clamp(min=1)
