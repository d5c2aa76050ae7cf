"""Class head and text classifier of queries that see the pixels inside their mask (FC-CLIP and ODISE)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipdense.inference.background import max_over_synonyms
from clipdense.maskformer import MLP, MaskPrediction
from clipdense.systems.mask_pooling.pooling import pool_logits

__all__ = ["MAX_SCALE", "PooledQueryHead", "SynonymClassifier", "max_logits"]

MAX_SCALE = 100.0
"""Largest inverse temperature of a learned logit scale (CLIP, Radford et al., ICML 2021, section 2.5)."""


class PooledQueryHead(nn.Module):
    """Query embedding from the decoder's output x_q and the mask features inside the query's mask:
    v_q = MLP(x_q + W LN(mean of the features where the mask logit is above 0)).

    Source: FC-CLIP (Yu et al., NeurIPS 2023, section 3.3); with ``norm`` ODISE (Xu et al., CVPR 2023,
    section 3.3).
    """

    def __init__(
        self,
        hidden_dim: int,
        mask_dim: int,
        embed_dim: int,
        *,
        num_layers: int = 3,
        norm: bool = False,
        binary: bool = False,
    ) -> None:
        """
        Args:
            hidden_dim: Channels of a query.
            mask_dim: Channels of the mask features.
            embed_dim: D, channels of the embedding.
            num_layers: Linear layers of the MLP, which are `hidden_dim` wide.
            norm: LayerNorm before the MLP (ODISE).
            binary: Also predict logits of "object" and "no object" from the query alone (ODISE trained on
                captions).
        """
        super().__init__()
        self.pool_proj = nn.Sequential(nn.LayerNorm(mask_dim), nn.Linear(mask_dim, hidden_dim))
        self.norm = nn.LayerNorm(hidden_dim) if norm else nn.Identity()
        self.mlp = MLP(hidden_dim, hidden_dim, embed_dim, num_layers)
        self.objectness = nn.Linear(hidden_dim, 2) if binary else None

    def forward(self, queries: Tensor, mask_logits: Tensor, mask_features: Tensor) -> MaskPrediction:
        """Predict query embeddings. See `clipdense.maskformer.ClassHead`."""
        embeddings = self.mlp(self.norm(self.fuse(queries, mask_logits, mask_features)))
        objectness = None if self.objectness is None else self.objectness(queries)
        return MaskPrediction(mask_logits=mask_logits, class_logits=objectness, query_embeddings=embeddings)

    def fuse(self, queries: Tensor, mask_logits: Tensor, mask_features: Tensor) -> Tensor:
        """Add the projected pixels inside each mask to its query: (B, Q, C)."""
        fused: Tensor = queries + self.pool_proj(pool_logits(mask_features, mask_logits.detach()))
        return fused


class SynonymClassifier(nn.Module):
    """Cosine classifier whose class score is that of the best synonym, with a learned void embedding.

    logit_k = s max over the names n of class k of cos(v, t_n), logit_void = s cos(v, t_void).

    Attributes:
        void: (1, D_text), learned.
        logit_scale: log s, learned; s is at most 100.
        text_proj: Learned projection of all text embeddings, the void embedding included (ODISE); None:
            CLIP's embeddings as they are (FC-CLIP).
    """

    def __init__(self, text_dim: int, *, project_to: int = 0) -> None:
        """
        Args:
            text_dim: D_text, channels of the text embeddings.
            project_to: Channels of the projected text embeddings; 0: no projection.
        """
        super().__init__()
        self.void = nn.Parameter(torch.randn(1, text_dim))
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.text_proj = nn.Linear(text_dim, project_to) if project_to else None
        self.embed_dim = project_to or text_dim

    @property
    def scale(self) -> Tensor:
        """The inverse temperature s."""
        return self.logit_scale.exp().clamp(max=MAX_SCALE)

    def project(self, text: Tensor) -> Tensor:
        """Project text embeddings (N, D_text) to unit length in the space of the queries."""
        return F.normalize(text if self.text_proj is None else self.text_proj(text), dim=-1)

    def forward(
        self, embeddings: Tensor, rows: Tensor, classes: Tensor, num_classes: int | None = None
    ) -> Tensor:
        """Classify query embeddings.

        Args:
            embeddings: (..., D).
            rows: (N, D_text), one text embedding per name.
            classes: (N,) int64, the class of each name, in order.
            num_classes: K; None reads it from `classes`, which waits for the device.

        Returns:
            (..., K + 1) logits, void last.
        """
        logits = self.name_logits(embeddings, rows)
        return torch.cat([max_logits(logits[..., :-1], classes, num_classes), logits[..., -1:]], dim=-1)

    def name_logits(self, embeddings: Tensor, rows: Tensor) -> Tensor:
        """Compare query embeddings (..., D) with names (N, D_text): logits (..., N + 1), void last."""
        text = self.project(torch.cat([rows, self.void]))
        return (self.scale * F.normalize(embeddings, dim=-1) @ text.T).float()


def max_logits(logits: Tensor, classes: Tensor, num_classes: int | None = None) -> Tensor:
    """Reduce the logits of names (..., N) to those of classes (..., K) by their maximum.

    Args:
        logits: (..., N).
        classes: (N,) int64, the class of each name, in order.
        num_classes: K; None reads it from `classes`, which waits for the device.
    """
    num_classes = int(classes[-1]) + 1 if num_classes is None else num_classes
    if len(classes) == num_classes:
        return logits
    return max_over_synonyms(logits.movedim(-1, 0), classes, num_classes).movedim(0, -1)
