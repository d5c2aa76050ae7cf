"""Decoders of semantic segmentation: Semantic FPN, UPerNet, and the score map alone.

DeepLabV3+ is in `clipdense.systems.denseclip.deeplab`. All are used through one interface, `SemanticHead`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import fvcore.nn.weight_init as weight_init
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipdense.backbone import SCORE
from clipdense.systems.denseclip.loss import Average, check_average, pixel_cross_entropy

from detectron2.config import CfgNode, configurable
from detectron2.layers import Conv2d, ShapeSpec, get_norm
from detectron2.modeling import SEM_SEG_HEADS_REGISTRY
from detectron2.modeling.meta_arch.semantic_seg import SemSegFPNHead

__all__ = ["ScoreMapHead", "SemanticFPNHead", "SemanticHead", "UPerNetHead"]

Features = Mapping[str, Tensor]
Shapes = Mapping[str, ShapeSpec]


class SemanticHead(Protocol):
    """The part of Detectron2's semantic heads that `WindowedSemanticSegmentor` uses.

    Attributes:
        ignore_value: label of pixels that have no loss.
    """

    ignore_value: int

    def layers(self, features: Features) -> Tensor:
        """Map the backbone's maps to logits (B, K, h, w), of any size."""

    def __call__(self, features: Features, targets: Tensor) -> tuple[Tensor | None, dict[str, Tensor]]:
        """Return None and the losses, in training, for labels (B, H, W)."""


@SEM_SEG_HEADS_REGISTRY.register()
class SemanticFPNHead(SemSegFPNHead):
    """Detectron2's Semantic FPN head (Kirillov et al., CVPR 2019) for maps of any size, with dropout.

    The maps are summed at the size of the finest one, so that no map has to be a multiple of another.
    """

    @configurable
    def __init__(
        self,
        input_shape: Shapes,
        *,
        dropout: float = 0.1,
        loss_average: Average = "labelled",
        **kwargs: Any,
    ) -> None:
        """
        Args:
            input_shape: the maps; the finest one has the stride ``common_stride``.
            dropout: rate at which whole channels are dropped before the classifier, in 0..1.
            loss_average: the pixels that the loss is averaged over, see `pixel_cross_entropy`.
            kwargs: arguments of `SemSegFPNHead`.

        Raises:
            ValueError: If ``loss_average`` is unknown.
        """
        super().__init__(input_shape, **kwargs)
        check_average(loss_average)
        self.dropout = nn.Dropout2d(dropout)
        self.loss_average = loss_average

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: Shapes) -> dict[str, Any]:
        keys = cfg.MODEL.SEM_SEG_HEAD
        arguments: dict[str, Any] = super().from_config(cfg, input_shape)
        return arguments | {"dropout": keys.DROPOUT, "loss_average": keys.LOSS_AVERAGE}

    def layers(self, features: Features) -> Tensor:
        """Map pyramid maps to logits (B, K, h, w) at the size of the finest map."""
        x, *coarser = (
            head(features[name]) for name, head in zip(self.in_features, self.scale_heads, strict=True)
        )
        for y in coarser:
            x = x + F.interpolate(y, x.shape[-2:], mode="bilinear", align_corners=False)
        logits: Tensor = self.predictor(self.dropout(x))
        return logits

    def losses(self, predictions: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Compute "loss_sem_seg" of logits (B, K, h, w) for labels (B, H, W)."""
        return _losses(self, predictions, targets)


@SEM_SEG_HEADS_REGISTRY.register()
class UPerNetHead(nn.Module):
    """UPerNet's decoder: a pyramid of pooled contexts on the last map, an FPN, and their fusion.

    Source: Xiao et al., Unified Perceptual Parsing for Scene Understanding, ECCV 2018.
    """

    @configurable
    def __init__(
        self,
        input_shape: Shapes,
        *,
        num_classes: int,
        conv_dims: int = 512,
        norm: str = "BN",
        pool_sizes: Sequence[int] = (1, 2, 3, 6),
        dropout: float = 0.1,
        ignore_value: int = 255,
        loss_weight: float = 1.0,
        loss_average: Average = "labelled",
    ) -> None:
        """
        Args:
            input_shape: the trunk's maps.
            num_classes: K.
            conv_dims: channels of every layer.
            norm: norm of every convolution, a name that Detectron2 knows.
            pool_sizes: sides of the grids to which the last map is pooled.
            dropout, loss_average: see `SemanticFPNHead`.
            ignore_value: label of pixels that have no loss.
            loss_weight: factor of the loss.

        Raises:
            ValueError: If ``loss_average`` is unknown.
        """
        super().__init__()
        check_average(loss_average)
        shapes = sorted(input_shape.items(), key=lambda item: item[1].stride)
        self.in_features = [name for name, _ in shapes]
        channels = [shape.channels for _, shape in shapes]
        self.ignore_value, self.loss_weight, self.loss_average = ignore_value, loss_weight, loss_average

        def conv(inputs: int, kernel: int) -> Conv2d:
            layer = Conv2d(
                inputs,
                conv_dims,
                kernel,
                padding=kernel // 2,
                bias=not norm,
                norm=get_norm(norm, conv_dims),
                activation=F.relu,
            )
            weight_init.c2_msra_fill(layer)
            return layer

        self.pools = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(size), conv(channels[-1], 1)) for size in pool_sizes
        )
        self.bottleneck = conv(channels[-1] + len(pool_sizes) * conv_dims, 3)
        self.laterals = nn.ModuleList(conv(count, 1) for count in channels[:-1])
        self.outputs = nn.ModuleList(conv(conv_dims, 3) for _ in channels[:-1])
        self.fusion = conv(len(channels) * conv_dims, 3)
        self.dropout = nn.Dropout2d(dropout)
        self.predictor = Conv2d(conv_dims, num_classes, 1)
        nn.init.normal_(self.predictor.weight, std=0.01)
        nn.init.zeros_(self.predictor.bias)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: Shapes) -> dict[str, Any]:
        keys = cfg.MODEL.SEM_SEG_HEAD
        return {
            "input_shape": {name: input_shape[name] for name in keys.IN_FEATURES},
            "num_classes": keys.NUM_CLASSES,
            "conv_dims": keys.CONVS_DIM,
            "norm": keys.NORM,
            "dropout": keys.DROPOUT,
            "ignore_value": keys.IGNORE_VALUE,
            "loss_weight": keys.LOSS_WEIGHT,
            "loss_average": keys.LOSS_AVERAGE,
        }

    def forward(
        self, features: Features, targets: Tensor | None = None
    ) -> tuple[Tensor | None, dict[str, Tensor]]:
        """Return None and the losses in training, logits (B, K, h, w) and no losses in evaluation."""
        logits = self.layers(features)
        if not self.training:
            return logits, {}
        assert targets is not None
        return None, _losses(self, logits, targets)

    def layers(self, features: Features) -> Tensor:
        """Map the trunk's maps to logits (B, K, h, w) at the size of the finest map."""
        *finer, last = (features[name] for name in self.in_features)
        contexts = [_resize(pool(last), last) for pool in self.pools]
        levels = [lateral(x) for lateral, x in zip(self.laterals, finer, strict=True)]
        levels.append(self.bottleneck(torch.cat([last, *contexts], dim=1)))
        for i in range(len(levels) - 1, 0, -1):
            levels[i - 1] = levels[i - 1] + _resize(levels[i], levels[i - 1])
        levels[:-1] = [output(x) for output, x in zip(self.outputs, levels[:-1], strict=True)]
        fused = self.fusion(torch.cat([_resize(x, levels[0]) for x in levels], dim=1))
        logits: Tensor = self.predictor(self.dropout(fused))
        return logits


@SEM_SEG_HEADS_REGISTRY.register()
class ScoreMapHead(nn.Module):
    """No decoder: the score map of the language backbone is the segmentation."""

    @configurable
    def __init__(
        self, *, ignore_value: int = 255, loss_weight: float = 1.0, loss_average: Average = "labelled"
    ) -> None:
        """
        Args:
            ignore_value: label of pixels that have no loss.
            loss_weight: factor of the loss.
            loss_average: see `SemanticFPNHead`.

        Raises:
            ValueError: If ``loss_average`` is unknown.
        """
        super().__init__()
        check_average(loss_average)
        self.ignore_value, self.loss_weight, self.loss_average = ignore_value, loss_weight, loss_average

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: Shapes) -> dict[str, Any]:
        keys = cfg.MODEL.SEM_SEG_HEAD
        if SCORE not in input_shape:
            raise ValueError(
                "ScoreMapHead needs a backbone with a score map: set MODEL.BACKBONE.NAME LanguageTrunk"
            )
        return {
            "ignore_value": keys.IGNORE_VALUE,
            "loss_weight": keys.LOSS_WEIGHT,
            "loss_average": keys.LOSS_AVERAGE,
        }

    def forward(
        self, features: Features, targets: Tensor | None = None
    ) -> tuple[Tensor | None, dict[str, Tensor]]:
        """Return None and the losses in training, logits (B, K, h, w) and no losses in evaluation."""
        if not self.training:
            return self.layers(features), {}
        assert targets is not None
        return None, _losses(self, self.layers(features), targets)

    def layers(self, features: Features) -> Tensor:
        """Return the score map (B, K, h, w)."""
        return features[SCORE]


def _losses(head: Any, logits: Tensor, targets: Tensor) -> dict[str, Tensor]:
    loss = pixel_cross_entropy(logits, targets, head.ignore_value, head.loss_average)
    return {"loss_sem_seg": head.loss_weight * loss}


def _resize(x: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(x, like.shape[-2:], mode="bilinear", align_corners=False)
