"""Text tower for any number of tokens up to its context length."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from open_clip.transformer import TextTransformer, Transformer
from torch import Tensor, nn

from clipdense.clip.attention import AttentionParameters, TokenStream, plain
from clipdense.clip.position import truncate_text
from clipdense.clip.towers.base import adopt
from clipdense.clip.towers.vit import ClipBlock


class TextTower(nn.Module):
    """open_clip's TextTransformer, or the text part of its CLIP, with the key names of a `custom_text` model.

    Attributes:
        embed_dim: D of the joint space.
        width: C of the tokens.
        causal: whether tokens attend only to themselves and their predecessors.
        context_length: number of positions. A causal tower takes any length up to it, a bidirectional tower
            (SigLIP) takes exactly this length.
        pool_type: token whose state is the text embedding: "argmax" (the largest id, which ends CLIP's
            texts), "eos", "last" or "first".
        eos_id: id of the end token for "eos".
        averages_first: whether the prompts of a name are averaged, un-normalised, between `unfinished` and
            `finish` (Talk2DINO). Otherwise normalised embeddings are averaged.
    """

    averages_first: bool = False

    token_embedding: nn.Embedding
    positional_embedding: nn.Parameter
    transformer: Transformer
    ln_final: nn.Module
    text_projection: nn.Parameter | nn.Linear | None

    def __init__(self, text: nn.Module) -> None:
        super().__init__()
        source: Any = text
        if isinstance(text, TextTransformer):
            if text.cls_emb is not None or text.use_pad_mask:
                raise ValueError("text towers with CoCa's class token or a padding mask are not supported")
            adopt(self, text)
            self.causal, pool_type, eos_id = text.attn_mask is not None, text.pool_type, text.eos_id
        elif hasattr(text, "text_pool_type"):  # open_clip.model.CLIP keeps the text parts itself
            for name in ("transformer", "token_embedding", "ln_final"):
                self.add_module(name, getattr(text, name))
            self.register_parameter("positional_embedding", source.positional_embedding)
            if isinstance(source.text_projection, nn.Module):
                self.add_module("text_projection", source.text_projection)
            else:
                self.register_parameter("text_projection", source.text_projection)
            self.causal = source.attn_mask is not None
            pool_type, eos_id = source.text_pool_type, source.text_eos_id
        else:
            raise ValueError(
                f"text tower {type(text).__name__} is not supported: load the model with text=False and give "
                f"its text embeddings as a precomputed table"
            )
        self.text_projection = getattr(self, "text_projection", None)
        self.pool_type: str = pool_type
        self.eos_id: int = eos_id
        self.context_length, self.width = self.positional_embedding.shape
        projection = self.text_projection
        self.embed_dim: int = (
            self.width
            if projection is None
            else projection.out_features
            if isinstance(projection, nn.Linear)
            else projection.shape[1]
        )

    def forward(self, tokens: Tensor) -> Tensor:
        """Embed token ids (n, L), best on the CPU, as (n, D), not L2-normalised.

        A causal tower whose texts end with their largest id skips the padding after the longest text.

        Raises:
            ValueError: If L exceeds the context length, or differs from it for a bidirectional tower.
        """
        if self.pool_type == "argmax" and self.causal and len(tokens):
            tokens = tokens[:, : int(tokens.argmax(1).max()) + 1]  # no wait for the device, on the CPU
        tokens = tokens.to(self.positional_embedding.device, non_blocking=True)
        return self.encode(self.token_embedding(tokens), self.end(tokens))

    def unfinished(self, tokens: Tensor) -> Tensor:
        """Embed token ids (n, L) as far as each prompt of a name is embedded alone."""
        embeddings: Tensor = self(tokens)
        return embeddings

    def finish(self, embeddings: Tensor) -> Tensor:
        """Turn results of `unfinished` (n, D'), or means of them, into embeddings (n, D)."""
        return embeddings

    def end(self, tokens: Tensor) -> Tensor:
        """Return the position (n,) of each text whose state is the text embedding."""
        if self.pool_type == "argmax":
            return tokens.argmax(1)
        if self.pool_type == "eos":
            return (tokens == self.eos_id).int().argmax(1)
        return tokens.new_full((len(tokens),), tokens.shape[1] - 1 if self.pool_type == "last" else 0)

    def encode(self, embeddings: Tensor, end: Tensor) -> Tensor:
        """Embed texts that are given as token embeddings, e.g. with learned contexts.

        Args:
            embeddings: (n, L, C), positions not added.
            end: (n,) positions whose states are the text embeddings.

        Returns:
            (n, D), not L2-normalised.

        Raises:
            ValueError: See `forward`.
        """
        states = self.states(embeddings)[-1]
        pooled: Tensor = self.ln_final(states[torch.arange(len(states), device=states.device), end])
        if self.text_projection is None:
            return pooled
        if isinstance(self.text_projection, nn.Linear):
            return F.linear(pooled, self.text_projection.weight, self.text_projection.bias)
        return pooled @ self.text_projection

    def attentions(self) -> tuple[AttentionParameters, ...]:
        """Return the attention projections of the blocks, first to last."""
        blocks: Any = self.transformer.resblocks
        return tuple(ClipBlock(block).attention_parameters() for block in blocks)

    def states(self, embeddings: Tensor) -> list[Tensor]:
        """Return the tokens (n, L, C) after each block, for token embeddings (n, L, C) without positions."""
        length = embeddings.shape[1]
        if not self.causal and length != self.context_length:
            raise ValueError(
                f"a bidirectional text tower takes all its {self.context_length} tokens, not {length}"
            )
        blocks: Any = self.transformer.resblocks
        x = embeddings + truncate_text(self.positional_embedding, length)
        stream, states = TokenStream(x.to(blocks[0].get_weight_dtype()), (0, 0), causal=self.causal), []
        for block in blocks:
            stream = plain(ClipBlock(block), stream)
            states.append(stream.x)
        return states
