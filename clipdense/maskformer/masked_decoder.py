"""Mask2Former's transformer decoder with masked attention (Cheng et al., CVPR 2022, section 3.2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipdense.maskformer.deformable import NUM_LEVELS
from clipdense.maskformer.layers import (
    MLP,
    FeedForward,
    build_input_proj,
    residual,
    sine_position,
    to_tokens,
    xavier_matrices,
)
from clipdense.maskformer.prediction import TRANSFORMER_DECODER_REGISTRY, MaskPrediction, dot_masks
from clipdense.maskformer.transformer import StandardTransformerDecoder

from detectron2.config import CfgNode, configurable

__all__ = ["MultiScaleMaskedTransformerDecoder"]


class CrossAttentionLayer(nn.Module):
    """Masked cross-attention from queries to pixels."""

    def __init__(self, dim: int, nheads: int, dropout: float, pre_norm: bool) -> None:
        super().__init__()
        self.multihead_attn = nn.MultiheadAttention(dim, nheads, dropout, batch_first=True)
        self.norm = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)
        self.pre_norm = pre_norm

    def forward(
        self, x: Tensor, query_position: Tensor, memory: Tensor, position: Tensor, blocked: Tensor
    ) -> Tensor:
        """Update queries x (B, Q, C) from pixels (B, S, C); `blocked` (B, Q, S) bool hides pixels of a
        query."""
        mask = blocked.repeat_interleave(self.multihead_attn.num_heads, dim=0)
        key = memory + position

        def attend(x: Tensor) -> Tensor:
            return self.multihead_attn(x + query_position, key, memory, attn_mask=mask, need_weights=False)[0]

        return residual(x, self.norm, attend, self.dropout, self.pre_norm)


class SelfAttentionLayer(nn.Module):
    """Self-attention of queries."""

    def __init__(self, dim: int, nheads: int, dropout: float, pre_norm: bool) -> None:
        super().__init__()
        self.self_attn = nn.MultiheadAttention(dim, nheads, dropout, batch_first=True)
        self.norm = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)
        self.pre_norm = pre_norm

    def forward(self, x: Tensor, query_position: Tensor) -> Tensor:
        """Update queries x (B, Q, C) with positions (Q, C)."""

        def attend(x: Tensor) -> Tensor:
            query = x + query_position
            return self.self_attn(query, query, x, need_weights=False)[0]

        return residual(x, self.norm, attend, self.dropout, self.pre_norm)


class FFNLayer(FeedForward):
    """Feed-forward layer with its norm."""

    def __init__(self, dim: int, dim_feedforward: int, dropout: float, pre_norm: bool) -> None:
        super().__init__(dim, dim_feedforward, dropout)
        self.norm = nn.LayerNorm(dim)
        self.pre_norm = pre_norm

    def forward(self, x: Tensor) -> Tensor:
        """Update queries x (B, Q, C)."""
        return residual(x, self.norm, self.feed_forward, self.dropout, self.pre_norm)


@TRANSFORMER_DECODER_REGISTRY.register()
class MultiScaleMaskedTransformerDecoder(nn.Module):
    """Decoder whose queries attend to coarse to fine maps in turn, in each layer only to the pixels inside
    the mask that they currently predict."""

    num_levels = NUM_LEVELS
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
        dec_layers: int = 9,
        dropout: float = 0.0,
        pre_norm: bool = False,
        enforce_input_project: bool = False,
    ) -> None:
        """
        Args:
            in_channels: Channels of each map.
            class_embed: See `StandardTransformerDecoder`, also for the arguments that are not listed here.
            dec_layers: Layers, each with three sub-layers. Published configs count one more, the prediction
                before the first layer.
        """
        super().__init__()
        layers = range(dec_layers)
        self.transformer_cross_attention_layers = nn.ModuleList(
            CrossAttentionLayer(hidden_dim, nheads, dropout, pre_norm) for _ in layers
        )
        self.transformer_self_attention_layers = nn.ModuleList(
            SelfAttentionLayer(hidden_dim, nheads, dropout, pre_norm) for _ in layers
        )
        self.transformer_ffn_layers = nn.ModuleList(
            FFNLayer(hidden_dim, dim_feedforward, dropout, pre_norm) for _ in layers
        )
        xavier_matrices(self)
        self.decoder_norm = nn.LayerNorm(hidden_dim)
        self.query_feat = nn.Embedding(num_queries, hidden_dim)
        self.query_embed = nn.Embedding(num_queries, hidden_dim)
        self.level_embed = nn.Embedding(NUM_LEVELS, hidden_dim)
        self.input_proj = nn.ModuleList(
            build_input_proj(in_channels, hidden_dim, enforce_input_project) for _ in range(NUM_LEVELS)
        )
        self.class_embed = class_embed
        self.mask_embed = MLP(hidden_dim, hidden_dim, mask_dim, 3)

    @classmethod
    def from_config(cls, cfg: CfgNode, in_channels: int, class_embed: nn.Module) -> dict[str, object]:
        """Read the constructor arguments from ``MODEL.MASK_FORMER``."""
        arguments = StandardTransformerDecoder.from_config(cfg, in_channels, class_embed)
        del arguments["enc_layers"]  # the pixel decoder has the encoder
        return arguments

    def forward(self, levels: Sequence[Tensor], mask_features: Tensor) -> MaskPrediction:
        """Predict masks.

        Args:
            levels: Three maps (B, in_channels, h, w), from coarse to fine.
            mask_features: (B, mask_dim, H, W).

        Returns:
            The last layer's prediction; in training with the predictions of the learned queries and of the
            earlier layers.
        """
        projected = [proj(x) for proj, x in zip(self.input_proj, levels, strict=True)]
        sizes = [x.shape[-2:] for x in projected]
        positions = [
            to_tokens(sine_position(x.shape[-2], x.shape[-1], x.shape[1], x.device)) for x in projected
        ]
        memories = [
            to_tokens(x) + embedding for x, embedding in zip(projected, self.level_embed.weight, strict=True)
        ]
        query_position = self.query_embed.weight
        x = self.query_feat.weight.expand(mask_features.shape[0], -1, -1)
        predictions = []
        masks = self._masks(x, mask_features)
        for i, (cross, attend, ffn) in enumerate(
            zip(
                self.transformer_cross_attention_layers,
                self.transformer_self_attention_layers,
                self.transformer_ffn_layers,
                strict=True,
            )
        ):
            if self.training:
                predictions.append(self.class_embed(self.decoder_norm(x), masks, mask_features))
            level = i % NUM_LEVELS
            blocked = _blocked(masks, sizes[level])
            x = cross(x, query_position, memories[level], positions[level], blocked)
            x = ffn(attend(x, query_position))
            masks = self._masks(x, mask_features)
        last = self.class_embed(self.decoder_norm(x), masks, mask_features)
        return replace(last, aux=predictions)

    def _masks(self, x: Tensor, mask_features: Tensor) -> Tensor:
        return dot_masks(self.mask_embed(self.decoder_norm(x)), mask_features)


@torch.no_grad()
def _blocked(masks: Tensor, size: tuple[int, int]) -> Tensor:
    """Find the pixels of a map that each query must not attend to (B, Q, h * w), from mask logits (B, Q, H,
    W).

    A query whose mask is empty attends to all pixels.
    """
    resized = F.interpolate(masks, size=size, mode="bilinear", align_corners=False)
    outside = resized.flatten(2).sigmoid() < 0.5
    return outside & ~outside.all(dim=2, keepdim=True)
