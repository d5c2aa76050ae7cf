"""Learned contexts for text towers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from clipdense.clip.model import ClipModel
from clipdense.clip.text import LearnedPrompts
from clipdense.clip.towers import TextTower

__all__ = ["AffixPrompts", "ContextPrompts", "encode_with_contexts", "insert_contexts"]


def insert_contexts(tower: TextTower, tokens: Tensor, contexts: Tensor) -> Tensor:
    """Build token embeddings [start | contexts | rest of the text].

    Args:
        tower: text tower whose token table is used.
        tokens: ids (K, L) of the texts without contexts.
        contexts: (B, N, C), B sets of N vectors.

    Returns:
        (B, K, L + N, C): every text with every set, positions not added.
    """
    words: Tensor = tower.token_embedding(tokens)
    batch, count = len(contexts), len(words)
    start, rest = (part.expand(batch, -1, -1, -1) for part in (words[None, :, :1], words[None, :, 1:]))
    return torch.cat([start, contexts.to(words.dtype)[:, None].expand(-1, count, -1, -1), rest], dim=2)


def encode_with_contexts(tower: TextTower, tokens: Tensor, contexts: Tensor) -> Tensor:
    """Embed K texts with B sets of contexts.

    If the contexts are the token embeddings of a sentence's words, the result is the embedding of the
    sentence. Same arguments as `insert_contexts`.

    Returns:
        (B, K, D), not L2-normalised.

    Raises:
        ValueError: If a text with its contexts is longer than the tower's positions, or the tower is
            bidirectional, because padding changes its result.
    """
    if not tower.causal:
        raise ValueError("learned contexts need a causal text tower; this one is bidirectional")
    end = tower.end(tokens)
    tokens = tokens[:, : int(end.max()) + 1]
    sequences = insert_contexts(tower, tokens, contexts)
    batch, count = sequences.shape[:2]
    embeddings = tower.encode(sequences.flatten(0, 1), (end + contexts.shape[1]).repeat(batch))
    return embeddings.reshape(batch, count, -1)


class ContextPrompts(LearnedPrompts):
    """Contexts shared by all texts, between the start token and the text.

    Attributes:
        contexts: (1, N, C).

    Source: CoOp (Zhou et al., IJCV 2022), class token at the end; DenseCLIP (Rao et al., CVPR 2022), section
        3.2.
    """

    def __init__(self, n_ctx: int, width: int, std: float = 1.0) -> None:
        """
        Args:
            n_ctx: N, number of context vectors.
            width: C of the text tower's tokens.
            std: standard deviation of the initial normal distribution, truncated at 2: DenseCLIP uses 1, CoOp
                uses 0.02.
        """
        super().__init__()
        self.length = n_ctx
        self.contexts = nn.Parameter(torch.zeros(1, n_ctx, width))
        if std:  # the truncated normal distribution is undefined for 0
            nn.init.trunc_normal_(self.contexts, std=std)

    def forward(self, clip: ClipModel, tokens: Tensor) -> Tensor:
        """Embed token ids (n, L) with the contexts as (n, D), not L2-normalised.

        Raises:
            ValueError: If the CLIP has no text tower; see also `encode_with_contexts`.
        """
        if clip.text is None:
            raise ValueError(f"'{clip.name}' was loaded without its text tower: load it with text=True")
        return encode_with_contexts(clip.text, tokens, self.contexts)[0]


class AffixPrompts(LearnedPrompts):
    """Learned vectors around a class name: [start | prefix | name | suffix | last token | end].

    The last token is the full stop of the template "{}.".

    Attributes:
        prefix: (P, C), vectors before the name.
        suffix: (S, C), vectors after the name.

    Source: zsseg (Xu et al., A Simple Baseline for Open-Vocabulary Semantic Segmentation, ECCV 2022), section
        3.3.
    """

    def __init__(self, n_prefix: int, n_suffix: int, width: int, std: float = 0.02) -> None:
        """
        Args:
            n_prefix: P, may be 0. Published: 16.
            n_suffix: S, may be 0. Published: 0.
            width: C of the text tower's tokens.
            std: standard deviation of the initial normal distribution.
        """
        super().__init__()
        self.length = n_prefix + n_suffix
        self.prefix = nn.Parameter(torch.randn(n_prefix, width) * std)
        self.suffix = nn.Parameter(torch.randn(n_suffix, width) * std)

    def forward(self, clip: ClipModel, tokens: Tensor) -> Tensor:
        """Embed token ids (n, L) with the learned vectors as (n, D), not L2-normalised.

        Raises:
            ValueError: If the CLIP has no text tower; see also `encode_with_contexts`.
        """
        if clip.text is None:
            raise ValueError(f"'{clip.name}' was loaded without its text tower: load it with text=True")
        tower = clip.text
        if not tower.causal:
            raise ValueError("learned contexts need a causal text tower; this one is bidirectional")
        end = tower.end(tokens)
        tokens = tokens[:, : int(end.max()) + 1]
        words = tower.token_embedding(tokens)
        affixes = torch.cat([self.prefix, self.suffix]).to(words.dtype).expand(len(words), -1, -1)
        # place of every token, prefix vector and suffix vector in the sequence
        place = torch.arange(tokens.shape[1], device=tokens.device).expand(len(words), -1)
        last = end[:, None] - 1
        moved = place + len(self.prefix) * (place > 0) + len(self.suffix) * (place >= last)
        prefix = torch.arange(1, len(self.prefix) + 1, device=tokens.device).expand(len(words), -1)
        suffix = torch.arange(len(self.suffix), device=tokens.device) + last + len(self.prefix)
        order = torch.cat([moved, prefix, suffix], dim=1)
        rows = torch.cat([words, affixes], dim=1)
        sequence = torch.zeros_like(rows).scatter(1, order[:, :, None].expand_as(rows), rows)
        return tower.encode(sequence, end + self.length)
