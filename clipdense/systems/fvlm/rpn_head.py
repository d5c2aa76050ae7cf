"""RPN head with norms."""

from __future__ import annotations

from typing import Any

from detectron2.config import CfgNode, configurable
from detectron2.layers import Conv2d, ShapeSpec, get_norm
from detectron2.modeling.proposal_generator.rpn import RPN_HEAD_REGISTRY, StandardRPNHead

__all__ = ["NormRPNHead"]


@RPN_HEAD_REGISTRY.register()
class NormRPNHead(StandardRPNHead):
    """Detectron2's RPN head, each convolution followed by a norm and then the ReLU; all levels share it
    (F-ViT on OV-LVIS).
    """

    @configurable
    def __init__(self, *, norm: str, **kwargs: Any) -> None:
        """
        Args:
            norm: any of Detectron2, not empty.
            kwargs: of `StandardRPNHead`.
        """
        super().__init__(**kwargs)
        for conv in self.conv.modules():
            if isinstance(conv, Conv2d):
                conv.norm = get_norm(norm, conv.out_channels)
                conv.register_parameter("bias", None)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: list[ShapeSpec]) -> dict[str, Any]:
        return super().from_config(cfg, input_shape) | {"norm": cfg.MODEL.RPN.NORM}
