"""Class heads of transformer decoders: what is predicted about the class of each query."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor, nn

from clipdense.maskformer.layers import MLP
from clipdense.maskformer.prediction import MaskPrediction

__all__ = ["ClassHead", "EmbeddingHead", "LinearClassHead"]


class ClassHead(Protocol):
    """Interface of class heads (``class_embed`` of a transformer decoder)."""

    def __call__(self, queries: Tensor, mask_logits: Tensor, mask_features: Tensor) -> MaskPrediction:
        """Predict class logits or query embeddings of one decoder layer.

        Args:
            queries: (B, Q, C), the decoder's output after its norm.
            mask_logits: (B, Q, H, W) of the same queries.
            mask_features: (B, C', H, W), the pixel decoder's map, for heads that pool it inside each mask
                (FC-CLIP, ODISE).

        Returns:
            A prediction with `mask_logits` and with class logits, query embeddings or both.
        """
        ...


class LinearClassHead(nn.Linear):
    """Linear layer from a query to the logits of fixed classes (MaskFormer, Cheng et al., NeurIPS 2021)."""

    def __init__(self, hidden_dim: int, num_classes: int) -> None:
        """
        Args:
            hidden_dim: channels of a query.
            num_classes: K, without "no object".
        """
        super().__init__(hidden_dim, num_classes + 1)

    def forward(  # type: ignore[override]
        self, queries: Tensor, mask_logits: Tensor, mask_features: Tensor
    ) -> MaskPrediction:
        """Predict class logits from the queries alone. See `ClassHead`."""
        return MaskPrediction(mask_logits=mask_logits, class_logits=super().forward(queries))


class EmbeddingHead(MLP):
    """MLP from a query to its embedding in a text encoder's space (zsseg, Xu et al., ECCV 2022; ZegFormer,
    Ding et al., CVPR 2022; OVSeg, Liang et al., CVPR 2023)."""

    def forward(  # type: ignore[override]
        self, queries: Tensor, mask_logits: Tensor, mask_features: Tensor
    ) -> MaskPrediction:
        """Predict embeddings from the queries alone. See `ClassHead`."""
        return MaskPrediction(mask_logits=mask_logits, query_embeddings=super().forward(queries))
