"""Swin Transformer as detectors use it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from timm.models.swin_transformer import SwinTransformerBlock
from torch import Tensor, nn

from clipdense.backbone.timm_trunk import TimmTrunk

from detectron2.config import configurable
from detectron2.modeling import BACKBONE_REGISTRY

__all__ = ["SwinTrunk"]


class _Block(SwinTransformerBlock):
    """A block that pads its map to whole windows before it is shifted (timm pads after that)."""

    def _attn(self, x: Tensor) -> Tensor:
        (_, h, w, _), (wh, ww) = x.shape, self.window_size
        return super()._attn(F.pad(x, (0, 0, 0, -w % ww, 0, -h % wh)))[:, :h, :w]


@BACKBONE_REGISTRY.register()
class SwinTrunk(TimmTrunk):
    """A Swin Transformer of timm (Liu et al., ICCV 2021), with what the original has for dense prediction.

    Every map has a norm of its own, windows are never smaller than in pre-training, and maps of any size are
    padded to whole windows. Other sizes than those of timm's models are arguments in MODEL.TIMM.KWARGS
    (``embed_dim``, ``depths``, ``num_heads``, ``window_size``).
    """

    @configurable
    def __init__(self, name: str, *, kwargs: Mapping[str, Any] | None = None, **others: Any) -> None:
        """
        Args:
            name: a Swin model of timm.
            kwargs, others: see `TimmTrunk`.

        Raises:
            ValueError: a model of another family; and what `TimmTrunk` raises.
        """
        if not name.startswith("swin_"):
            raise ValueError(f"SwinTrunk needs a Swin Transformer (MODEL.TIMM.NAME swin_...), not {name!r}")
        super().__init__(name, kwargs={"always_partition": True, **(kwargs or {})}, **others)
        for module in self.model.modules():
            if isinstance(module, SwinTransformerBlock):
                module.__class__ = _Block
        self.norms = nn.ModuleDict({key: nn.LayerNorm(s.channels) for key, s in self._outputs.items()})
        self._size_divisibility = 4
        self._freeze(others.get("freeze_at", 0), others.get("norm", "BN"))

    def stages(self) -> list[list[nn.Module | nn.Parameter]]:
        *stages, last = super().stages()
        return [*stages, [*last, *getattr(self, "norms", {}).values()]]

    def features(self, images: Tensor) -> dict[str, Tensor]:
        maps = zip(self._outputs, self.model(images), strict=True)
        return {name: self.norms[name](x).permute(0, 3, 1, 2).contiguous() for name, x in maps}
