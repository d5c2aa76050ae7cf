"""Talk2DINO: CLIP's text embeddings projected into the patch space of DINOv2."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = [
    "TextProjection",
    "class_token_logits",
    "clean_background",
    "head_embeddings",
    "pair_similarity",
    "projection_state",
    "soft_masks",
    "talk2dino_loss",
]

ATTENTION_SCALE = 0.125
"""Scale of the class token's attention, whatever the width of a head."""
_EPS = 1e-6


class TextProjection(nn.Module):
    """W_2 tanh(W_1 e + b_1) + b_2 of a CLIP text embedding e.

    Args:
        text_dim: dimension of e.
        dim: dimension of the patch space, and of the hidden layer.

    Source: Talk2DINO (Barsellotti et al., ICCV 2025), section 3.2.
    """

    def __init__(self, text_dim: int, dim: int) -> None:
        super().__init__()
        self.linear_layer = nn.Linear(text_dim, dim)
        self.hidden_layers = nn.ModuleList([nn.Linear(dim, dim)])

    def forward(self, embeddings: Tensor) -> Tensor:
        """Project (..., text_dim) to (..., dim), not normalised."""
        y: Tensor = self.hidden_layers[0](torch.tanh(self.linear_layer(embeddings)))
        return y

    def embed_classes(self, template_features: Tensor) -> Tensor:
        """Embed classes from the text embeddings of their templates.

        Args:
            template_features: (K, templates, text_dim), as the text encoder gives them: they are averaged
                without normalisation.

        Returns:
            (K, dim), L2-normalised.
        """
        return F.normalize(self(template_features.mean(1)), dim=-1, eps=_EPS)

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> TextProjection:
        """Build the projection of a published file (four tensors; older files name the second layer
        ``linear_layer2``).

        Raises:
            RuntimeError: If the file has other keys or shapes.
        """
        renamed = projection_state(state)
        weight = renamed.get("linear_layer.weight")
        if weight is None:
            raise RuntimeError(f"no linear_layer.weight among {sorted(state)}: not a Talk2DINO projection")
        projection = cls(weight.shape[1], weight.shape[0])
        projection.load_state_dict(renamed)
        return projection


def projection_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a published projection under the names of `TextProjection`."""
    return {key.replace("linear_layer2.", "hidden_layers.0."): value for key, value in state.items()}


def class_token_logits(qkv: Tensor, heads: int, prefix: int, scale: float = ATTENTION_SCALE) -> Tensor:
    """Compute the attention logits of the class token in DINO's last block.

    Args:
        qkv: (B, prefix + N, 3 dim), queries, keys and values side by side.
        heads: number of heads.
        prefix: number of tokens before the patches.
        scale: factor of the products.

    Returns:
        (B, heads, N).
    """
    q, k, _ = qkv.reshape(*qkv.shape[:2], 3, heads, -1).permute(2, 0, 3, 1, 4)
    logits: Tensor = scale * (q[:, :, :1] @ k[:, :, prefix:].transpose(2, 3))[:, :, 0]
    return logits


def soft_masks(features: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    """Compare patch features (B, dim, h, w) with class embeddings (K, dim).

    Returns:
        Cosines (B, K, h, w), and their sigmoid.
    """
    normed = F.normalize(features, dim=1, eps=_EPS)
    cosines = torch.einsum("bdhw,kd->bkhw", normed, text)
    return cosines, cosines.sigmoid()


def clean_background(
    masks: Tensor, logits: Tensor, features: Tensor, text: Tensor, weight: float = 0.2
) -> Tensor:
    """Mix masks with the attention maps of the heads that fit each class.

    Args:
        masks: S (B, K, h, w) from `soft_masks`.
        logits: a (B, heads, h w) from `class_token_logits`.
        features: (B, dim, h, w), not normalised.
        text: (K, dim), L2-normalised.
        weight: lambda; the result is (S + lambda m) / (1 + lambda).

    Source: Talk2DINO (Barsellotti et al., ICCV 2025), section 3.4.
    """
    tokens = features.flatten(2).transpose(1, 2)
    e = F.normalize(logits @ tokens / tokens.shape[1], dim=2, eps=_EPS)
    share = (e @ text.T).softmax(1)  # (B, heads, K)
    m = share.transpose(1, 2) @ logits / share.sum(1)[:, :, None]
    m = m.softmax(2).reshape(masks.shape)
    m = (m - m.min()) / m.max()
    m = m * (masks.max() - masks.min()) + masks.min()
    return (masks + weight * m) / (1 + weight)


def head_embeddings(logits: Tensor, tokens: Tensor) -> Tensor:
    """Average patch tokens with the attention of each head.

    Args:
        logits: (B, heads, N) from `class_token_logits`.
        tokens: (B, N, dim).

    Returns:
        (B, heads, dim), the mean over the patches of softmax(a) x token.
    """
    return logits.softmax(2) @ tokens / tokens.shape[1]


def pair_similarity(text: Tensor, heads: Tensor) -> Tensor:
    """Compare captions with images, each of which is embedded by the head that fits its own caption.

    Args:
        text: (B, dim) projected captions.
        heads: (B, heads, dim) from `head_embeddings`.

    Returns:
        (B, B) cosines, captions in rows.
    """
    t, e = F.normalize(text, dim=1, eps=_EPS), F.normalize(heads, dim=2, eps=_EPS)
    best = torch.einsum("bd,bhd->bh", t, e).argmax(1)
    return t @ e[torch.arange(len(e), device=e.device), best].T


def talk2dino_loss(similarity: Tensor, scale: float) -> Tensor:
    """Compute InfoNCE in both directions, divided by the square of the batch size as in the released code."""
    target = torch.arange(len(similarity), device=similarity.device)
    logits = scale * similarity
    both = F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)
    return both / 2 / len(similarity) ** 2
