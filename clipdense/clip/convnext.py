"""ConvNeXt CLIP of any size; open_clip only has the released sizes, by timm's names."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import timm
from open_clip.timm_model import TimmModel
from timm.layers import Mlp
from torch import nn

CONVNEXT_CLIP = "convnext_clip"
"""Value of `timm_model_name` in an open_clip `vision_cfg` whose layers (blocks of each stage), widths
(channels of each stage), timm_proj ("mlp" or "linear") and image_size describe a ConvNeXt tower."""


class ConvNeXtModel(TimmModel):  # type: ignore[misc]  # open_clip has no types
    """open_clip's adapter around timm's ConvNeXt of the sizes in `vision_cfg`.

    Args:
        embed_dim: D of the joint space.
        vision_cfg: see `CONVNEXT_CLIP`; all sizes are required.

    Raises:
        ValueError: If timm_proj is unknown.
    """

    def __init__(self, embed_dim: int, vision_cfg: Mapping[str, Any]) -> None:
        nn.Module.__init__(self)  # TimmModel.__init__ only builds registered trunks of fixed size
        size, widths = vision_cfg["image_size"], list(vision_cfg["widths"])
        self.image_size = (size, size) if isinstance(size, int) else tuple(size)
        self.trunk = timm.create_model(
            "convnext_base",  # sets what does not depend on the size
            num_classes=0,
            depths=list(vision_cfg["layers"]),
            dims=widths,
        )
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        if vision_cfg["timm_proj"] == "mlp":
            layers["mlp"] = Mlp(widths[-1], 2 * embed_dim, embed_dim, bias=(True, False))
        elif vision_cfg["timm_proj"] == "linear":
            layers["drop"] = nn.Dropout(0.0)
            layers["proj"] = nn.Linear(widths[-1], embed_dim, bias=False)
        else:
            raise ValueError(f"timm_proj must be mlp or linear, not {vision_cfg['timm_proj']!r}")
        self.head = nn.Sequential(layers)
