"""True masks of an image from its label maps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F

from clipdense.maskformer.prediction import Targets

__all__ = ["TARGETS", "pad_targets", "panoptic_targets", "semantic_targets"]


def semantic_targets(sample: dict[str, Any], ignore_label: int = 255) -> Targets:
    """One mask for each class of ``sem_seg`` (H, W) but ``ignore_label``."""
    labels = sample["sem_seg"].unique()
    labels = labels[labels != ignore_label]
    return Targets(labels, sample["sem_seg"] == labels[:, None, None])


def panoptic_targets(sample: dict[str, Any], ignore_label: int = 255) -> Targets:
    """One mask for each segment of ``pan_seg`` (H, W) that is no crowd and is still in the image.

    Args:
        sample: with ``segments_info``, whose ``category_id`` are contiguous.
        ignore_label: of semantic maps; nothing to a panoptic one.
    """
    segments = [s for s in sample["segments_info"] if not s.get("iscrowd", 0)]
    ids, labels = (
        sample["pan_seg"].new_tensor([s[key] for s in segments], dtype=sample["pan_seg"].dtype)
        for key in ("id", "category_id")
    )
    masks = sample["pan_seg"] == ids[:, None, None]
    there = masks.flatten(1).any(dim=1)
    return Targets(labels[there], masks[there])


TARGETS = {"semantic": semantic_targets, "panoptic": panoptic_targets}


def pad_targets(targets: Sequence[Targets], size: tuple[int, int]) -> list[Targets]:
    """Targets whose masks have one size (H, W): what is added, right and below, is outside of all."""
    padded = []
    for labels, masks in targets:
        h, w = masks.shape[-2:]
        padded.append(Targets(labels, F.pad(masks, (0, size[1] - w, 0, size[0] - h))))
    return padded
