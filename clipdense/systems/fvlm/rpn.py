"""RPN variants of the published F-ViT detectors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from detectron2.config import CfgNode, configurable
from detectron2.layers import Conv2d, ShapeSpec, get_norm
from detectron2.modeling.proposal_generator import PROPOSAL_GENERATOR_REGISTRY, RPN
from detectron2.modeling.proposal_generator.rpn import RPN_HEAD_REGISTRY, StandardRPNHead
from detectron2.structures import Boxes, Instances

__all__ = ["NormRPNHead", "ProbabilityRPN"]


@RPN_HEAD_REGISTRY.register()
class NormRPNHead(StandardRPNHead):
    """Detectron2's RPN head with a norm between each convolution and its ReLU, shared by all levels (F-ViT on
    OV-LVIS).
    """

    @configurable
    def __init__(self, *, norm: str, **kwargs: Any) -> None:
        """
        Args:
            norm: any norm of Detectron2; not empty.
            kwargs: arguments of `StandardRPNHead`.
        """
        super().__init__(**kwargs)
        for conv in self.conv.modules():
            if isinstance(conv, Conv2d):
                conv.norm = get_norm(norm, conv.out_channels)
                conv.register_parameter("bias", None)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: list[ShapeSpec]) -> dict[str, Any]:
        return super().from_config(cfg, input_shape) | {"norm": cfg.MODEL.RPN.NORM}


@PROPOSAL_GENERATOR_REGISTRY.register()
class ProbabilityRPN(RPN):
    """Detectron2's RPN with proposals ranked by probability instead of logit, as in mmdetection.

    In float32, all logits above about 17 become probability 1, and the first anchors win. The field
    ``objectness_logits`` of its proposals holds probabilities.
    """

    def predict_proposals(
        self,
        anchors: list[Boxes],
        pred_objectness_logits: list[Tensor],
        pred_anchor_deltas: list[Tensor],
        image_sizes: Sequence[tuple[int, int]],
    ) -> list[Instances]:
        """Rank, decode and filter proposals; arguments as `RPN.predict_proposals`."""
        probabilities = [logits.sigmoid() for logits in pred_objectness_logits]
        found: list[Instances] = super().predict_proposals(
            anchors, probabilities, pred_anchor_deltas, image_sizes
        )
        return found
