"""Mask2Former's pixel decoder: multi-scale deformable attention (Zhu et al., Deformable DETR, ICLR 2021) over
three maps, without a compiled operator."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

import fvcore.nn.weight_init as weight_init
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipdense.maskformer.layers import (
    FeedForward,
    conv_norm,
    sine_position,
    to_map,
    to_tokens,
    xavier_matrices,
)
from clipdense.maskformer.pixel_decoder import by_stride
from clipdense.maskformer.prediction import PIXEL_DECODER_REGISTRY, PixelFeatures

from detectron2.config import CfgNode, configurable
from detectron2.layers import Conv2d, ShapeSpec

__all__ = ["NUM_LEVELS", "MSDeformAttn", "MSDeformAttnPixelDecoder", "deformable_attention"]

NUM_LEVELS = 3
"""Number of the coarsest maps, which attend to each other; finer maps only enter the pyramid."""


def deformable_attention(
    value: Tensor, sizes: Sequence[tuple[int, int]], locations: Tensor, weights: Tensor
) -> Tensor:
    """Sum sampled pixels for each query and head (Deformable DETR, equation 3).

    Args:
        value: (B, S, heads, D), the pixels of all maps, one map after another.
        sizes: Height and width of each map.
        locations: (B, Q, heads, levels, points, 2), x and y in 0 .. 1 of the map.
        weights: (B, Q, heads, levels, points), which sum to 1 over levels and points.

    Returns:
        (B, Q, heads * D).
    """
    b, _, heads, d = value.shape
    grids = (2 * locations - 1).transpose(1, 2).flatten(0, 1)  # (B * heads, Q, levels, points, 2)
    weights = weights.transpose(1, 2).flatten(0, 1)
    output = value.new_zeros(b * heads, d, locations.shape[1])
    for level, pixels in enumerate(value.split([h * w for h, w in sizes], dim=1)):
        image = pixels.permute(0, 2, 3, 1).reshape(b * heads, d, *sizes[level])
        sampled = F.grid_sample(image, grids[:, :, level], align_corners=False)
        output = output + torch.einsum("ndqp,nqp->ndq", sampled, weights[:, :, level])
    return output.view(b, heads * d, -1).transpose(1, 2)


class MSDeformAttn(nn.Module):
    """Multi-scale deformable attention: each query predicts sampling points on each map and their weights."""

    def __init__(self, dim: int, levels: int, heads: int, points: int) -> None:
        super().__init__()
        self.shape = heads, levels, points
        self.sampling_offsets = nn.Linear(dim, heads * levels * points * 2)
        self.attention_weights = nn.Linear(dim, heads * levels * points)
        self.value_proj = nn.Linear(dim, dim)
        self.output_proj = nn.Linear(dim, dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise sampling offsets: each head has its own direction, and its points lie 1, 2, ... pixels
        away."""
        heads, levels, points = self.shape
        angle = torch.arange(heads) * (2 * math.pi / heads)
        direction = torch.stack([angle.cos(), angle.sin()], dim=1)
        direction = direction / direction.abs().amax(dim=1, keepdim=True)
        steps = torch.arange(1, points + 1)[:, None]
        offsets = (direction[:, None, None] * steps).expand(heads, levels, points, 2)
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(offsets.flatten())
        for layer in (self.sampling_offsets, self.attention_weights):
            nn.init.zeros_(layer.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for layer in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(
        self, query: Tensor, value: Tensor, reference: Tensor, sizes: list[tuple[int, int]]
    ) -> Tensor:
        """
        Args:
            query: (B, Q, C).
            value: (B, S, C), the pixels of all maps.
            reference: (Q, 2), the points that offsets start from, x and y in 0 .. 1 of any map.
            sizes: Height and width of each map.

        Returns:
            (B, Q, C).
        """
        heads, levels, points = self.shape
        offsets = self.sampling_offsets(query).unflatten(2, (heads, levels, points, 2))
        weights = self.attention_weights(query).unflatten(2, (heads, levels * points)).softmax(dim=3)
        width_height = torch.tensor([(w, h) for h, w in sizes], device=query.device)
        locations = reference[:, None, None, None] + offsets / width_height[:, None]
        value = self.value_proj(value).unflatten(2, (heads, -1))
        weights = weights.unflatten(3, (levels, points))
        return self.output_proj(deformable_attention(value, sizes, locations, weights))


class DeformableEncoderLayer(FeedForward):
    """Deformable attention among the pixels of all maps."""

    def __init__(self, dim: int, dim_feedforward: int, dropout: float, heads: int, points: int) -> None:
        super().__init__(dim, dim_feedforward, dropout)
        self.self_attn = MSDeformAttn(dim, NUM_LEVELS, heads, points)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)

    def forward(self, x: Tensor, position: Tensor, reference: Tensor, sizes: list[tuple[int, int]]) -> Tensor:
        """Update pixels x (B, S, C) with positions (S, C) and normalised coordinates (S, 2)."""
        x = self.norm1(x + self.dropout(self.self_attn(x + position, x, reference, sizes)))
        return self.norm2(x + self.dropout(self.feed_forward(x)))


class DeformableEncoder(nn.Module):
    """Deformable attention layers over the pixels of all maps."""

    def __init__(self, dim: int, layers: int, **kwargs: Any) -> None:
        super().__init__()
        blocks = [DeformableEncoderLayer(dim, **kwargs) for _ in range(layers)]
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList(blocks)})
        self.level_embed = nn.Parameter(torch.empty(NUM_LEVELS, dim))
        xavier_matrices(self)
        nn.init.normal_(self.level_embed)
        for layer in blocks:
            layer.self_attn.reset_parameters()

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Update maps (B, C, h, w), from coarse to fine."""
        sizes = [(m.shape[-2], m.shape[-1]) for m in maps]
        dim, device = maps[0].shape[1], maps[0].device
        position = torch.cat(
            [
                to_tokens(sine_position(*size, dim, device)) + embedding
                for size, embedding in zip(sizes, self.level_embed, strict=True)
            ]
        )
        reference = torch.cat([_centers(*size, device) for size in sizes])
        x = torch.cat([to_tokens(m) for m in maps], dim=1)
        for layer in self.encoder["layers"].children():
            x = layer(x, position, reference, sizes)
        return [to_map(x, size) for x, size in zip(x.split([h * w for h, w in sizes], 1), sizes, strict=True)]


def _centers(height: int, width: int, device: torch.device) -> Tensor:
    """Compute pixel centres (H * W, 2), x and y in 0 .. 1."""
    y = (torch.arange(height, device=device) + 0.5) / height
    x = (torch.arange(width, device=device) + 0.5) / width
    return torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=2).flatten(0, 1)


@PIXEL_DECODER_REGISTRY.register()
class MSDeformAttnPixelDecoder(nn.Module):
    """Deformable attention among the three coarsest maps, then a feature pyramid over the finer maps
    (Mask2Former, Cheng et al., CVPR 2022, section 3.1).

    It runs in float32 under autocast too, as published: sampling points need the precision.
    """

    @configurable
    def __init__(
        self,
        input_shape: Mapping[str, ShapeSpec],
        *,
        conv_dim: int = 256,
        mask_dim: int = 256,
        norm: str = "GN",
        nheads: int = 8,
        points: int = 4,
        dim_feedforward: int = 1024,
        enc_layers: int = 6,
        dropout: float = 0.0,
    ) -> None:
        """
        Args:
            input_shape: The backbone's maps by name, at least four.
            conv_dim: Channels of all maps inside.
            mask_dim: Channels of the mask features.
            norm: Norm of the pyramid, a name that Detectron2 knows; "": none.
            nheads: Heads of the deformable attention.
            points: Sampling points of each head on each map.
            dim_feedforward: Hidden channels of the encoder's feed-forward layers.
            enc_layers: Layers of the encoder.
            dropout: Dropout of the encoder.

        Raises:
            ValueError: If there are fewer than four maps.
        """
        super().__init__()
        shapes = by_stride(input_shape)
        if len(shapes) <= NUM_LEVELS:
            raise ValueError(
                f"MSDeformAttnPixelDecoder needs at least {NUM_LEVELS + 1} maps, not {list(shapes)} "
                "(MODEL.MASK_FORMER.IN_FEATURES)"
            )
        self.finer, self.coarser = list(shapes)[:-NUM_LEVELS], list(shapes)[: -NUM_LEVELS - 1 : -1]
        self.level_channels = [conv_dim] * NUM_LEVELS
        convolutions = [nn.Conv2d(shapes[name].channels, conv_dim, 1) for name in self.coarser]
        for convolution in convolutions:
            nn.init.xavier_uniform_(convolution.weight)
            nn.init.zeros_(cast(Tensor, convolution.bias))
        self.input_proj = nn.ModuleList(
            nn.Sequential(convolution, nn.GroupNorm(32, conv_dim)) for convolution in convolutions
        )
        self.transformer = DeformableEncoder(
            conv_dim,
            enc_layers,
            dim_feedforward=dim_feedforward,
            dropout=dropout,
            heads=nheads,
            points=points,
        )
        for i, name in enumerate(self.finer, start=1):
            self.add_module(f"adapter_{i}", conv_norm(shapes[name].channels, conv_dim, 1, norm, relu=False))
            self.add_module(f"layer_{i}", conv_norm(conv_dim, conv_dim, 3, norm, relu=True))
        self.mask_features = Conv2d(conv_dim, mask_dim, 1)
        weight_init.c2_xavier_fill(self.mask_features)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: Mapping[str, ShapeSpec]) -> dict[str, Any]:
        """Read the constructor arguments from ``MODEL.MASK_FORMER``."""
        keys = cfg.MODEL.MASK_FORMER
        return {
            "input_shape": input_shape,
            "conv_dim": keys.PIXEL_DECODER.CONV_DIM,
            "mask_dim": keys.MASK_DIM,
            "norm": keys.PIXEL_DECODER.NORM,
            "nheads": keys.NHEADS,
            "points": keys.PIXEL_DECODER.POINTS,
            "dim_feedforward": keys.PIXEL_DECODER.DIM_FEEDFORWARD,
            "enc_layers": keys.PIXEL_DECODER.ENC_LAYERS,
            "dropout": keys.DROPOUT,
        }

    def forward(self, features: Mapping[str, Tensor]) -> PixelFeatures:
        """Compute mask features and the three maps, from coarse to fine."""
        with torch.autocast(features[self.coarser[0]].device.type, enabled=False):
            return self._forward({name: feature.float() for name, feature in features.items()})

    def _forward(self, features: Mapping[str, Tensor]) -> PixelFeatures:
        projected = [proj(features[name]) for proj, name in zip(self.input_proj, self.coarser, strict=True)]
        levels = self.transformer(projected)
        y = levels[-1]
        for i, name in reversed(list(enumerate(self.finer, start=1))):
            lateral = self.get_submodule(f"adapter_{i}")(features[name])
            y = lateral + F.interpolate(y, size=lateral.shape[-2:], mode="bilinear", align_corners=False)
            y = self.get_submodule(f"layer_{i}")(y)
        return PixelFeatures(self.mask_features(y), levels)
