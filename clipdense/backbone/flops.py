"""Fused attention for Detectron2's FLOP counter (fvcore's), which leaves it out with a warning."""

from __future__ import annotations

import math
from importlib import import_module
from typing import Any

from fvcore.nn.jit_handles import get_shape

ATTENTION = "aten::scaled_dot_product_attention"


def attention_flops(inputs: list[Any], outputs: list[Any]) -> float:
    """Multiply-adds of q k^T and of its product with v, for q (..., L, D), k (..., S, D), v (..., S, Dv)."""
    q, k, v = (get_shape(x) for x in inputs[:3])
    return math.prod(q[:-1]) * k[-2] * (q[-1] + v[-1])


# The package has a function of the module's name.
import_module("fvcore.nn.flop_count")._DEFAULT_SUPPORTED_OPS.setdefault(ATTENTION, attention_flops)
