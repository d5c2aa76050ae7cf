"""Swin Transformer for dense prediction."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.swin_transformer import SwinTransformerBlock
from torch import Tensor, nn

from clipdense.backbone.timm_trunk import TimmTrunk
from clipdense.clip.towers.base import adopt

from detectron2.config import configurable
from detectron2.modeling import BACKBONE_REGISTRY

__all__ = ["SwinTrunk"]


class PaddedSwinBlock(SwinTransformerBlock):
    """A Swin block that pads its map to whole windows before the cyclic shift; timm pads after the shift."""

    def __init__(self, block: SwinTransformerBlock) -> None:
        """
        Args:
            block: a block of timm, whose weights this one takes over.
        """
        with torch.device("meta"):  # no memory and no random numbers for parts that are replaced
            super().__init__(
                block.dim,
                block.input_resolution,
                num_heads=block.attn.num_heads,
                window_size=block.window_size,
                shift_size=block.shift_size,
                always_partition=True,
                dynamic_mask=True,
                mlp_ratio=block.mlp_ratio,
            )
        adopt(self, block)

    def _attn(self, x: Tensor) -> Tensor:
        (_, h, w, _), (wh, ww) = x.shape, self.window_size
        return super()._attn(F.pad(x, (0, 0, 0, -w % ww, 0, -h % wh)))[:, :h, :w]


@BACKBONE_REGISTRY.register()
class SwinTrunk(TimmTrunk):
    """A Swin Transformer of timm (Liu et al., ICCV 2021), as the original code uses it for dense prediction.

    Every output map has a layer norm, windows are never smaller than in pre-training, and maps of any size
    are padded to whole windows. MODEL.TIMM.KWARGS sets sizes that no model of timm has (``embed_dim``,
    ``depths``, ``num_heads``, ``window_size``).
    """

    @configurable
    def __init__(self, name: str, *, kwargs: Mapping[str, Any] | None = None, **others: Any) -> None:
        """
        Args:
            name: name of a Swin model of timm.
            kwargs, others: arguments of `TimmTrunk`.

        Raises:
            ValueError: If the model is not a Swin Transformer. See also `TimmTrunk`.
        """
        if not name.startswith("swin_"):
            raise ValueError(f"SwinTrunk needs a Swin Transformer (MODEL.TIMM.NAME swin_...), not {name!r}")
        super().__init__(name, kwargs={"always_partition": True, **(kwargs or {})}, **others)
        for module in list(self.model.modules()):
            for child_name, child in module.named_children():
                if isinstance(child, SwinTransformerBlock):
                    setattr(module, child_name, PaddedSwinBlock(child))
        self.norms = nn.ModuleDict({key: nn.LayerNorm(s.channels) for key, s in self._outputs.items()})
        self._size_divisibility = 4
        self._freeze(others.get("freeze_at", 0), others.get("norm", "BN"))

    def stages(self) -> list[list[nn.Module | nn.Parameter]]:
        *stages, last = super().stages()
        return [*stages, [*last, *getattr(self, "norms", {}).values()]]

    def features(self, images: Tensor) -> dict[str, Tensor]:
        maps = zip(self._outputs, self.model(images), strict=True)
        return {name: self.norms[name](x).permute(0, 3, 1, 2).contiguous() for name, x in maps}
