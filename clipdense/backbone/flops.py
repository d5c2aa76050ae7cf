"""Detectron2's FLOP counter with fused attention, which fvcore does not count."""

from __future__ import annotations

import math
from typing import Any

from fvcore.nn.jit_handles import get_shape
from torch import Tensor, nn

from detectron2.utils import analysis

__all__ = ["ATTENTION", "FlopCountAnalysis", "attention_flops"]

ATTENTION = "aten::scaled_dot_product_attention"
"""Name of the operator in fvcore's tables."""


def attention_flops(inputs: list[Any], outputs: list[Any]) -> float:
    """Count the multiply-adds of q k^T and of its product with v.

    Args:
        inputs: traced values; the first are q (..., L, D), k (..., S, D) and v (..., S, Dv).
        outputs: ignored.
    """
    q, k, v = (get_shape(x) for x in inputs[:3])
    return math.prod(q[:-1]) * k[-2] * (q[-1] + v[-1])


class FlopCountAnalysis(analysis.FlopCountAnalysis):
    """Detectron2's `FlopCountAnalysis`, which also counts fused attention."""

    def __init__(self, model: nn.Module, inputs: Tensor | tuple[Any, ...] | list[Any]) -> None:
        super().__init__(model, inputs)
        self.set_op_handle(ATTENTION, attention_flops)
