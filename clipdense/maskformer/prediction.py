"""What a mask-proposal network predicts, and the registries of its parts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from fvcore.common.registry import Registry
from torch import Tensor

__all__ = [
    "PIXEL_DECODER_REGISTRY",
    "TRANSFORMER_DECODER_REGISTRY",
    "MaskPrediction",
    "PixelFeatures",
    "Targets",
    "dot_masks",
]

PIXEL_DECODER_REGISTRY = Registry("PIXEL_DECODER")
PIXEL_DECODER_REGISTRY.__doc__ = """
Pixel decoders by name (``MODEL.MASK_FORMER.PIXEL_DECODER.NAME``), each built as ``decoder(cfg,
input_shape)``: from a backbone's maps to `PixelFeatures`.
"""

TRANSFORMER_DECODER_REGISTRY = Registry("TRANSFORMER_DECODER")
TRANSFORMER_DECODER_REGISTRY.__doc__ = """
Transformer decoders by name (``MODEL.MASK_FORMER.TRANSFORMER_DECODER``), each built as ``decoder(cfg,
in_channels, class_embed)``: from maps and mask features to a `MaskPrediction`.
"""


class PixelFeatures(NamedTuple):
    """What a pixel decoder gives.

    Attributes:
        mask_features: (B, C, H, W), at the finest of the backbone's strides.
        levels: maps (B, C, h, w) of its own that queries may look at, from coarse to fine.
    """

    mask_features: Tensor
    levels: list[Tensor]


@dataclass
class MaskPrediction:
    """A set of masks with classes.

    Attributes:
        logits: of the classes, the last of them "no object" (B, Q, K + 1); or, where the network's
            ``class_embed`` gives embeddings, those (B, Q, D).
        masks: mask logits (B, Q, H, W).
        aux: predictions of earlier layers, in their order; in training only.
    """

    logits: Tensor
    masks: Tensor
    aux: list[MaskPrediction] = field(default_factory=list)


class Targets(NamedTuple):
    """Ground truth of one image.

    Attributes:
        labels: classes (N,) int64.
        masks: (N, H, W) bool.
    """

    labels: Tensor
    masks: Tensor


def dot_masks(embeddings: Tensor, mask_features: Tensor) -> Tensor:
    """Embeddings (B, Q, C) of masks and mask features (B, C, H, W) -> mask logits (B, Q, H, W)."""
    return torch.einsum("bqc,bchw->bqhw", embeddings, mask_features)
