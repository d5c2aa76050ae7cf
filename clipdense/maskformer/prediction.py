"""Data that the parts of mask-proposal networks exchange, and the registries of these parts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from fvcore.common.registry import Registry
from torch import Tensor

from clipdense.regions import LazyMaps

__all__ = [
    "PIXEL_DECODER_REGISTRY",
    "TRANSFORMER_DECODER_REGISTRY",
    "MaskPrediction",
    "MaskProposals",
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
    """Output of a pixel decoder.

    Attributes:
        mask_features: (B, C, H, W), at the finest stride of the backbone's maps.
        levels: Maps (B, C, h, w) for the transformer decoder, from coarse to fine; may be empty.
    """

    mask_features: Tensor
    levels: list[Tensor]


@dataclass(kw_only=True)
class _Classified:
    """Masks of queries, and what classifies them.

    Attributes:
        mask_logits: (B, Q, H, W).
        class_logits: (B, Q, K + 1), "no object" last; None if the class head predicts embeddings only.
        query_embeddings: (B, Q, D), not normalised, which are compared with text embeddings; None if the
            class head predicts logits only.
    """

    mask_logits: Tensor
    class_logits: Tensor | None = None
    query_embeddings: Tensor | None = None

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


@dataclass(kw_only=True)
class MaskPrediction(_Classified):
    """Output of a transformer decoder: one mask for each query, at the stride of the mask features.

    Attributes:
        aux: Predictions of the earlier layers, in order; empty in evaluation.
    """

    aux: list[MaskPrediction] = field(default_factory=list)


@dataclass(kw_only=True)
class MaskProposals(_Classified):
    """Masks of a batch in evaluation, at the stride of the mask features.

    Attributes:
        padded_size: Height and width of the padded images, in pixels.
        image_sizes: Height and width of each image without padding, in pixels.
    """

    padded_size: tuple[int, int]
    image_sizes: list[tuple[int, int]]

    def padded_masks(self, b: int) -> LazyMaps:
        """Resize the mask logits of image b (Q, H, W) to the padded image, on request."""
        return LazyMaps(self.mask_logits[b]).resize(self.padded_size)

    def masks(self, b: int) -> LazyMaps:
        """Resize the mask logits of image b (Q, h, w) to the image without padding, on request."""
        return self.padded_masks(b).crop(self.image_sizes[b])


class Targets(NamedTuple):
    """Ground truth of one image.

    Attributes:
        labels: (N,) int64, the classes.
        masks: (N, H, W) bool.
    """

    labels: Tensor
    masks: Tensor


def dot_masks(embeddings: Tensor, mask_features: Tensor) -> Tensor:
    """Compute mask logits (B, Q, H, W) from mask embeddings (B, Q, C) and mask features (B, C, H, W)."""
    return torch.einsum("bqc,bchw->bqhw", embeddings, mask_features)
