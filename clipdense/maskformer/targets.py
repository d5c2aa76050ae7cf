"""Ground-truth masks of an image from its label maps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F

from clipdense.maskformer.prediction import Targets

__all__ = ["TARGETS", "pad_targets", "panoptic_targets", "semantic_targets"]


def semantic_targets(sample: dict[str, Any], ignore_label: int = 255) -> Targets:
    """Make one mask for each class of ``sem_seg`` (H, W) except `ignore_label`."""
    labels = sample["sem_seg"].unique()
    labels = labels[labels != ignore_label]
    return Targets(labels, sample["sem_seg"] == labels[:, None, None])


def panoptic_targets(sample: dict[str, Any], ignore_label: int = 255) -> Targets:
    """Make one mask for each segment of ``pan_seg`` (H, W) that is not a crowd and has a pixel in the image.

    Args:
        sample: With ``segments_info``, whose ``category_id`` are contiguous.
        ignore_label: Has no effect; both functions of `TARGETS` share a signature.
    """
    segments = [s for s in sample["segments_info"] if not s.get("iscrowd", 0)]
    ids, labels = (
        sample["pan_seg"].new_tensor([s[key] for s in segments], dtype=sample["pan_seg"].dtype)
        for key in ("id", "category_id")
    )
    masks = sample["pan_seg"] == ids[:, None, None]
    visible = masks.flatten(1).any(dim=1)
    return Targets(labels[visible], masks[visible])


TARGETS = {"semantic": semantic_targets, "panoptic": panoptic_targets}


def pad_targets(targets: Sequence[Targets], size: tuple[int, int]) -> list[Targets]:
    """Pad the masks with zeros, right and below, to one size (H, W)."""
    padded = []
    for labels, masks in targets:
        h, w = masks.shape[-2:]
        padded.append(Targets(labels, F.pad(masks, (0, size[1] - w, 0, size[0] - h))))
    return padded
