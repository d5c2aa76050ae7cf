"""DETR's transformer (Carion et al., ECCV 2020), and MaskFormer's queries in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from clipdense.maskformer.layers import (
    MLP,
    FeedForward,
    build_input_proj,
    residual,
    sine_position,
    to_map,
    to_tokens,
    xavier_matrices,
)
from clipdense.maskformer.prediction import TRANSFORMER_DECODER_REGISTRY, MaskPrediction, dot_masks

from detectron2.config import CfgNode, configurable

__all__ = ["StandardTransformerDecoder", "Transformer", "TransformerEncoder"]


class EncoderLayer(FeedForward):
    """Self-attention layer of pixels."""

    def __init__(self, dim: int, nheads: int, dim_feedforward: int, dropout: float, pre_norm: bool) -> None:
        super().__init__(dim, dim_feedforward, dropout)
        self.self_attn = nn.MultiheadAttention(dim, nheads, dropout, batch_first=True)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.pre_norm = pre_norm

    def forward(self, x: Tensor, position: Tensor) -> Tensor:
        """Update pixels x (B, S, C) with positions (S, C)."""

        def attend(x: Tensor) -> Tensor:
            return self.self_attn(x + position, x + position, x, need_weights=False)[0]

        x = residual(x, self.norm1, attend, self.dropout, self.pre_norm)
        return residual(x, self.norm2, self.feed_forward, self.dropout, self.pre_norm)


class DecoderLayer(FeedForward):
    """Self-attention of queries, followed by their cross-attention to pixels."""

    def __init__(self, dim: int, nheads: int, dim_feedforward: int, dropout: float, pre_norm: bool) -> None:
        super().__init__(dim, dim_feedforward, dropout)
        self.self_attn = nn.MultiheadAttention(dim, nheads, dropout, batch_first=True)
        self.multihead_attn = nn.MultiheadAttention(dim, nheads, dropout, batch_first=True)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(dim) for _ in range(3))
        self.pre_norm = pre_norm

    def forward(self, x: Tensor, query_position: Tensor, memory: Tensor, position: Tensor) -> Tensor:
        """Update queries x (B, Q, C) with positions (Q, C) from pixels (B, S, C) with positions (S, C)."""

        def attend(x: Tensor) -> Tensor:
            query = x + query_position
            return self.self_attn(query, query, x, need_weights=False)[0]

        def cross_attend(x: Tensor) -> Tensor:
            key = memory + position
            return self.multihead_attn(x + query_position, key, memory, need_weights=False)[0]

        x = residual(x, self.norm1, attend, self.dropout, self.pre_norm)
        x = residual(x, self.norm2, cross_attend, self.dropout, self.pre_norm)
        return residual(x, self.norm3, self.feed_forward, self.dropout, self.pre_norm)


class TransformerEncoder(nn.Module):
    """Self-attention layers of pixels; without layers pixels stay unchanged."""

    def __init__(
        self, dim: int, nheads: int, dim_feedforward: int, layers: int, dropout: float, pre_norm: bool
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            EncoderLayer(dim, nheads, dim_feedforward, dropout, pre_norm) for _ in range(layers)
        )
        self.norm = nn.LayerNorm(dim) if pre_norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Update a map (B, C, H, W) by attention among all of its pixels."""
        position = to_tokens(sine_position(x.shape[-2], x.shape[-1], x.shape[1], x.device))
        tokens = to_tokens(x)
        for layer in self.layers:
            tokens = layer(tokens, position)
        return to_map(self.norm(tokens), (x.shape[-2], x.shape[-1]))


class TransformerDecoder(nn.Module):
    """Cross-attention layers from queries to pixels."""

    def __init__(
        self, dim: int, nheads: int, dim_feedforward: int, layers: int, dropout: float, pre_norm: bool
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            DecoderLayer(dim, nheads, dim_feedforward, dropout, pre_norm) for _ in range(layers)
        )
        self.norm = nn.LayerNorm(dim)

    def forward(self, query_position: Tensor, memory: Tensor, position: Tensor) -> Tensor:
        """Decode queries.

        Args:
            query_position: (Q, C).
            memory: (B, S, C) pixels.
            position: (S, C) of the pixels.

        Returns:
            (L, B, Q, C), the queries after each layer and the norm. The next layer reads them without norm.
        """
        x = torch.zeros_like(query_position).expand(memory.shape[0], -1, -1)
        outputs = []
        for layer in self.layers:
            x = layer(x, query_position, memory, position)
            outputs.append(self.norm(x))
        return torch.stack(outputs)


class Transformer(nn.Module):
    """DETR's encoder and decoder with Xavier-uniform matrices."""

    def __init__(
        self,
        dim: int,
        nheads: int,
        dim_feedforward: int,
        *,
        enc_layers: int,
        dec_layers: int,
        dropout: float,
        pre_norm: bool,
    ) -> None:
        super().__init__()
        self.encoder = TransformerEncoder(dim, nheads, dim_feedforward, enc_layers, dropout, pre_norm)
        self.decoder = TransformerDecoder(dim, nheads, dim_feedforward, dec_layers, dropout, pre_norm)
        xavier_matrices(self)

    def forward(self, x: Tensor, query_position: Tensor) -> Tensor:
        """Decode queries with positions (Q, C) from a map (B, C, H, W) -> (L, B, Q, C) after each layer."""
        position = to_tokens(sine_position(x.shape[-2], x.shape[-1], x.shape[1], x.device))
        return self.decoder(query_position, to_tokens(self.encoder(x)), position)


@TRANSFORMER_DECODER_REGISTRY.register()
class StandardTransformerDecoder(nn.Module):
    """MaskFormer's transformer module (Cheng et al., NeurIPS 2021, section 3.3): queries attend to one coarse
    map, and the dot products of their mask embeddings with the mask features are mask logits."""

    num_levels = 1
    """Number of maps that the queries attend to."""

    @configurable
    def __init__(
        self,
        in_channels: int,
        class_embed: nn.Module,
        *,
        hidden_dim: int = 256,
        mask_dim: int = 256,
        num_queries: int = 100,
        nheads: int = 8,
        dim_feedforward: int = 2048,
        enc_layers: int = 0,
        dec_layers: int = 6,
        dropout: float = 0.1,
        pre_norm: bool = False,
        enforce_input_project: bool = False,
    ) -> None:
        """
        Args:
            in_channels: Channels of the map that queries attend to.
            class_embed: The class head, a module that follows the `ClassHead` protocol.
            hidden_dim: Channels of queries.
            mask_dim: Channels of the mask features and mask embeddings.
            num_queries: Number of masks.
            nheads: Attention heads.
            dim_feedforward: Hidden channels of the feed-forward layers.
            enc_layers: Self-attention layers of the map before queries attend to it.
            dec_layers: Layers of the decoder.
            dropout: Dropout of all layers.
            pre_norm: Normalise the input of sub-layers instead of their sums.
            enforce_input_project: Project the map even if it has `hidden_dim` channels.
        """
        super().__init__()
        self.input_proj = build_input_proj(in_channels, hidden_dim, enforce_input_project)
        self.query_embed = nn.Embedding(num_queries, hidden_dim)
        self.transformer = Transformer(
            hidden_dim,
            nheads,
            dim_feedforward,
            enc_layers=enc_layers,
            dec_layers=dec_layers,
            dropout=dropout,
            pre_norm=pre_norm,
        )
        self.class_embed = class_embed
        self.mask_embed = MLP(hidden_dim, hidden_dim, mask_dim, 3)

    @classmethod
    def from_config(cls, cfg: CfgNode, in_channels: int, class_embed: nn.Module) -> dict[str, object]:
        """Read the constructor arguments from ``MODEL.MASK_FORMER``."""
        keys = cfg.MODEL.MASK_FORMER
        return {
            "in_channels": in_channels,
            "class_embed": class_embed,
            "hidden_dim": keys.HIDDEN_DIM,
            "mask_dim": keys.MASK_DIM,
            "num_queries": keys.NUM_OBJECT_QUERIES,
            "nheads": keys.NHEADS,
            "dim_feedforward": keys.DIM_FEEDFORWARD,
            "enc_layers": keys.ENC_LAYERS,
            "dec_layers": keys.DEC_LAYERS,
            "dropout": keys.DROPOUT,
            "pre_norm": keys.PRE_NORM,
            "enforce_input_project": keys.ENFORCE_INPUT_PROJ,
        }

    def forward(self, levels: Sequence[Tensor], mask_features: Tensor) -> MaskPrediction:
        """Predict masks.

        Args:
            levels: One map (B, in_channels, h, w).
            mask_features: (B, mask_dim, H, W).

        Returns:
            The last layer's prediction; in training with the predictions of the earlier layers.
        """
        (x,) = levels
        queries = self.transformer(self.input_proj(x), self.query_embed.weight)
        queries = queries if self.training else queries[-1:]
        *aux, last = [
            self.class_embed(q, dot_masks(self.mask_embed(q), mask_features), mask_features) for q in queries
        ]
        return replace(last, aux=aux)
