"""DeepLabV3+ as a decoder of semantic segmentation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from clipdense.systems.denseclip.loss import Average, check_average, pixel_cross_entropy

from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import SEM_SEG_HEADS_REGISTRY
from detectron2.projects.deeplab import DeepLabV3PlusHead

__all__ = ["DeepLabHead"]


@SEM_SEG_HEADS_REGISTRY.register()
class DeepLabHead(DeepLabV3PlusHead):
    """Detectron2's DeepLabV3+ head (Chen et al., ECCV 2018) for images of any size.

    Detectron2's head pools image features over a window of the training crop, and needs images of at least
    that size; this one pools over the whole map.
    """

    @configurable
    def __init__(
        self, input_shape: Mapping[str, ShapeSpec], *, loss_average: Average = "labelled", **kwargs: Any
    ) -> None:
        """
        Args:
            input_shape: the trunk's maps.
            loss_average: the pixels that cross-entropy is averaged over, see `pixel_cross_entropy`.
            kwargs: arguments of `DeepLabV3PlusHead`.

        Raises:
            ValueError: If ``loss_average`` is unknown.
        """
        super().__init__(input_shape, **kwargs)
        check_average(loss_average)
        self.loss_average = loss_average

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: Mapping[str, ShapeSpec]) -> dict[str, Any]:
        keys = cfg.MODEL.SEM_SEG_HEAD
        if len(keys.PROJECT_CHANNELS) != len(keys.IN_FEATURES) - 1:
            raise ValueError(
                f"MODEL.SEM_SEG_HEAD.PROJECT_CHANNELS {list(keys.PROJECT_CHANNELS)}: expected a number for "
                f"each of IN_FEATURES {list(keys.IN_FEATURES)} but the coarsest"
            )
        if cfg.INPUT.CROP.ENABLED:  # Detectron2 reads its size, which this head does not need
            cfg = cfg.clone()
            cfg.defrost()
            cfg.INPUT.CROP.ENABLED = False
        arguments: dict[str, Any] = super().from_config(cfg, input_shape)
        return arguments | {"train_size": None, "loss_average": keys.LOSS_AVERAGE}

    def losses(self, predictions: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Compute "loss_sem_seg" of logits (B, K, h, w) for labels (B, H, W)."""
        if self.loss_type == "cross_entropy":
            loss = pixel_cross_entropy(predictions, targets, self.ignore_value, self.loss_average)
        else:
            size = targets.shape[-2:]
            loss = self.loss(F.interpolate(predictions.float(), size, mode="bilinear"), targets)
        return {"loss_sem_seg": self.loss_weight * loss}
