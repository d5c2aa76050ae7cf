"""Classification of query embeddings by text embeddings."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["QueryClassifier"]


class QueryClassifier(nn.Module):
    """Cosine classifier with a learned "no object" embedding: logits tau cos(v, t_k) (zsseg, Xu et al., ECCV
    2022; ZegFormer, Ding et al., CVPR 2022; OVSeg, Liang et al., CVPR 2023).

    Attributes:
        no_object: (1, D), learned.
        scale: tau, fixed, stored in checkpoints.
        normalize_no_object: Scale `no_object` to unit length as text embeddings are (OVSeg, zsseg; not
            ZegFormer).
    """

    scale: Tensor

    def __init__(self, dim: int, *, scale: float = 100.0, normalize_no_object: bool = True) -> None:
        """
        Args:
            dim: D, channels of the embeddings.
            scale: See the class.
            normalize_no_object: See the class.
        """
        super().__init__()
        self.no_object = nn.Parameter(torch.randn(1, dim) * dim**-0.5)
        self.register_buffer("scale", torch.tensor(scale))
        self.normalize_no_object = normalize_no_object

    def forward(self, embeddings: Tensor, text: Tensor) -> Tensor:
        """Compare query embeddings (..., D) with unit text embeddings (K, D) -> logits (..., K + 1), "no
        object" last.
        """
        no_object = F.normalize(self.no_object) if self.normalize_no_object else self.no_object
        return self.scale * F.normalize(embeddings, dim=-1) @ torch.cat([text, no_object]).T
