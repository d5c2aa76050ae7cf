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


@dataclass(kw_only=True)
class MaskPrediction:
    """A set of masks, one for each query, with what classifies them.

    Attributes:
        mask_logits: (B, Q, H, W).
        class_logits: (B, Q, K + 1), "no object" last; None if the class head predicts embeddings only.
        query_embeddings: (B, Q, D), not normalised, which are compared with text embeddings; None if the
            class head predicts logits only.
        aux: predictions of the earlier layers, in order; empty in evaluation.
    """

    mask_logits: Tensor
    class_logits: Tensor | None = None
    query_embeddings: Tensor | None = None
    aux: list[MaskPrediction] = field(default_factory=list)

    def require_class_logits(self) -> Tensor:
        """Return the class logits.

        Raises:
            ValueError: If the class head predicts embeddings, which a classifier has to compare with text.
        """
        if self.class_logits is None:
            raise ValueError("The prediction has query embeddings but no class logits; classify it first.")
        return self.class_logits

    def require_query_embeddings(self) -> Tensor:
        """Return the query embeddings.

        Raises:
            ValueError: If the class head predicts logits of fixed classes.
        """
        if self.query_embeddings is None:
            raise ValueError("The prediction has class logits but no query embeddings to compare with text.")
        return self.query_embeddings


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
