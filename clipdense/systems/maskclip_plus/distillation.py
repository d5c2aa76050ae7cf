"""Distillation of CLIP's features into a segmentor with text embeddings as classifier."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from clipdense.inference import DenseMap

__all__ = ["DistillableHead", "DistillableSegmentor", "feature_distance"]


class DistillableHead(Protocol):
    """A head whose classifier is text embeddings."""

    def embed(self, features: Mapping[str, Tensor]) -> Tensor:
        """Map the backbone's maps to features (B, D, h, w)."""

    def classify(self, embedded: Tensor) -> Tensor:
        """Map features to logits (B, K, h, w)."""

    def losses(self, predictions: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Compute the losses of logits for labels (B, H, W)."""


class DistillableSegmentor(Protocol):
    """A segmentor of which the parts can be called one after the other."""

    backbone: Any
    sem_seg_head: DistillableHead

    def training_batch(self, batched_inputs: Sequence[dict[str, Any]]) -> tuple[Tensor, Tensor]:
        """Return images (B, 3, H, W) and labels (B, H, W)."""


def feature_distance(student: Tensor, teacher: Sequence[DenseMap], padded: tuple[int, int]) -> Tensor:
    """Average the absolute differences between a segmentor's features and CLIP's normalised features.

    Args:
        student: (B, D, h, w) over the padded images; not normalised.
        teacher: maps of the B images, in order; each is resized bilinearly to the student's positions within
            its images, then L2-normalised.
        padded: (H, W) of the padded images in pixels.

    Source: the distillation variant of the code of Zhou et al., MaskCLIP, ECCV 2022.
    """
    steps = [side / cells for side, cells in zip(padded, student.shape[-2:], strict=True)]
    differences, start = [], 0
    for found in teacher:
        count = len(found.features)
        rows, columns = (math.ceil(side / step) for side, step in zip(found.size, steps, strict=True))
        target = F.normalize(found.resize(found.features, (rows, columns)), dim=1)
        ours = student[start : start + count, :, :rows, :columns].float()
        differences.append((ours - target).abs().flatten())
        start += count
    return torch.cat(differences).mean()
