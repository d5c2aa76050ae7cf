"""MaskFormer's pixel decoders (Cheng et al., NeurIPS 2021, section 3.2 and appendix)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import fvcore.nn.weight_init as weight_init
import torch.nn.functional as F
from torch import Tensor, nn

from clipdense.maskformer.layers import conv_norm, xavier_matrices
from clipdense.maskformer.prediction import PIXEL_DECODER_REGISTRY, PixelFeatures
from clipdense.maskformer.transformer import TransformerEncoder

from detectron2.config import CfgNode, configurable
from detectron2.layers import Conv2d, ShapeSpec

__all__ = ["BasePixelDecoder", "TransformerEncoderPixelDecoder", "by_stride"]


def by_stride(input_shape: Mapping[str, ShapeSpec]) -> dict[str, ShapeSpec]:
    """Sort maps from fine to coarse."""
    return dict(sorted(input_shape.items(), key=lambda item: item[1].stride))


@PIXEL_DECODER_REGISTRY.register()
class BasePixelDecoder(nn.Module):
    """Feature pyramid (Lin et al., CVPR 2017) whose finest map becomes the mask features."""

    @configurable
    def __init__(
        self,
        input_shape: Mapping[str, ShapeSpec],
        *,
        conv_dim: int = 256,
        mask_dim: int = 256,
        norm: str = "GN",
    ) -> None:
        """
        Args:
            input_shape: The backbone's maps by name.
            conv_dim: Channels of the pyramid.
            mask_dim: Channels of the mask features.
            norm: A norm that Detectron2 knows by name; "": none.
        """
        super().__init__()
        shapes = by_stride(input_shape)
        self.in_features = list(shapes)
        self.level_channels: list[int] = []
        self._build_top_down([s.channels for s in shapes.values()], conv_dim, norm)
        self.mask_features = Conv2d(conv_dim, mask_dim, 3, padding=1)
        weight_init.c2_xavier_fill(self.mask_features)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: Mapping[str, ShapeSpec]) -> dict[str, Any]:
        """Read the constructor arguments from ``MODEL.MASK_FORMER``."""
        return {
            "input_shape": input_shape,
            "conv_dim": cfg.MODEL.MASK_FORMER.PIXEL_DECODER.CONV_DIM,
            "mask_dim": cfg.MODEL.MASK_FORMER.MASK_DIM,
            "norm": cfg.MODEL.MASK_FORMER.PIXEL_DECODER.NORM,
        }

    def _build_top_down(self, channels: list[int], dim: int, norm: str) -> None:
        for i, c in enumerate(channels[:-1], start=1):
            self.add_module(f"adapter_{i}", conv_norm(c, dim, 1, norm, relu=False))
            self.add_module(f"layer_{i}", conv_norm(dim, dim, 3, norm, relu=True))
        self.add_module(f"layer_{len(channels)}", conv_norm(channels[-1], dim, 3, norm, relu=True))

    def _top_down(self, features: Mapping[str, Tensor], top: Tensor) -> Tensor:
        """Compute mask features from the backbone's maps, with `top` in place of the coarsest."""
        *finer, _ = self.in_features
        y = self.get_submodule(f"layer_{len(self.in_features)}")(top)
        for i, name in reversed(list(enumerate(finer, start=1))):
            lateral = self.get_submodule(f"adapter_{i}")(features[name])
            y = lateral + F.interpolate(y, size=lateral.shape[-2:], mode="nearest")
            y = self.get_submodule(f"layer_{i}")(y)
        return self.mask_features(y)

    def forward(self, features: Mapping[str, Tensor]) -> PixelFeatures:
        """Compute mask features; there are no levels."""
        return PixelFeatures(self._top_down(features, features[self.in_features[-1]]), [])


@PIXEL_DECODER_REGISTRY.register()
class TransformerEncoderPixelDecoder(BasePixelDecoder):
    """`BasePixelDecoder` with a transformer encoder on the coarsest map, whose output is the only level."""

    @configurable
    def __init__(
        self,
        input_shape: Mapping[str, ShapeSpec],
        *,
        conv_dim: int = 256,
        mask_dim: int = 256,
        norm: str = "GN",
        nheads: int = 8,
        dim_feedforward: int = 2048,
        enc_layers: int = 6,
        dropout: float = 0.1,
        pre_norm: bool = False,
    ) -> None:
        """
        Args:
            input_shape: See `BasePixelDecoder`.
            conv_dim: See `BasePixelDecoder`.
            mask_dim: See `BasePixelDecoder`.
            norm: See `BasePixelDecoder`.
            nheads: Attention heads of the encoder.
            dim_feedforward: Hidden channels of the encoder's feed-forward layers.
            enc_layers: Layers of the encoder.
            dropout: Dropout of the encoder.
            pre_norm: Normalise the input of sub-layers instead of their sums.
        """
        shapes = by_stride(input_shape)
        coarsest = list(shapes)[-1]
        projected = {**shapes, coarsest: ShapeSpec(channels=conv_dim, stride=shapes[coarsest].stride)}
        super().__init__(projected, conv_dim=conv_dim, mask_dim=mask_dim, norm=norm)
        self.level_channels = [conv_dim]
        self.input_proj = Conv2d(shapes[coarsest].channels, conv_dim, 1)
        weight_init.c2_xavier_fill(self.input_proj)
        encoder = TransformerEncoder(conv_dim, nheads, dim_feedforward, enc_layers, dropout, pre_norm)
        xavier_matrices(encoder)
        self.transformer = nn.ModuleDict({"encoder": encoder})

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: Mapping[str, ShapeSpec]) -> dict[str, Any]:
        """Read the constructor arguments from ``MODEL.MASK_FORMER``."""
        keys = cfg.MODEL.MASK_FORMER
        return super().from_config(cfg, input_shape) | {
            "nheads": keys.NHEADS,
            "dim_feedforward": keys.DIM_FEEDFORWARD,
            "enc_layers": keys.PIXEL_DECODER.ENC_LAYERS,
            "dropout": keys.DROPOUT,
            "pre_norm": keys.PRE_NORM,
        }

    def forward(self, features: Mapping[str, Tensor]) -> PixelFeatures:
        """Compute mask features, and the encoder's map as the only level."""
        encoded = self.transformer["encoder"](self.input_proj(features[self.in_features[-1]]))
        return PixelFeatures(self._top_down(features, encoded), [encoded])
