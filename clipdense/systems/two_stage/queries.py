"""Classification of mask proposals by the words that their embeddings are close to."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["QueryClassifier"]


class QueryClassifier(nn.Module):
    """Logits of K classes and "no object": scale cos(v, t_k), with a learned embedding for "no object".

    Attributes:
        no_object: (1, D).
        scale: fixed; in checkpoints.
    """

    scale: Tensor

    def __init__(self, dim: int, *, scale: float = 100.0, normalize_no_object: bool = True) -> None:
        """
        Args:
            dim: D.
            normalize_no_object: whether ``no_object`` is scaled to length 1 (OVSeg, zsseg; not ZegFormer).
        """
        super().__init__()
        self.no_object = nn.Parameter(torch.randn(1, dim) * dim**-0.5)
        self.register_buffer("scale", torch.tensor(scale))
        self.normalize_no_object = normalize_no_object

    def forward(self, embeddings: Tensor, text: Tensor) -> Tensor:
        """Embeddings (..., D) of queries, unit embeddings (K, D) of words -> logits (..., K + 1)."""
        no_object = F.normalize(self.no_object) if self.normalize_no_object else self.no_object
        return self.scale * F.normalize(embeddings, dim=-1) @ torch.cat([text, no_object]).T
