"""EVA02-CLIP of any size; open_clip only has the released sizes, by timm's names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import timm
from open_clip.timm_model import TimmModel
from torch import nn

EVA02_CLIP = "eva02_clip"
"""Value of `timm_model_name` in an open_clip `vision_cfg` whose width, layers, head_width, patch_size,
mlp_ratio and image_size are the sizes of an EVA02 tower."""


class EVA02Model(TimmModel):  # type: ignore[misc]  # open_clip has no types
    """open_clip's adapter around timm's EVA02-CLIP (RoPE, SwiGLU, sub-norms) of the sizes in `vision_cfg`.

    Args:
        embed_dim: D of the joint space.
        vision_cfg: see `EVA02_CLIP`; all sizes are required.
    """

    def __init__(self, embed_dim: int, vision_cfg: Mapping[str, Any]) -> None:
        nn.Module.__init__(self)  # TimmModel.__init__ only builds registered trunks of fixed size
        size, width = vision_cfg["image_size"], vision_cfg["width"]
        self.image_size = (size, size) if isinstance(size, int) else tuple(size)
        self.trunk = timm.create_model(
            "eva02_base_patch16_clip_224",  # sets what does not depend on the size
            num_classes=embed_dim,
            img_size=self.image_size,
            patch_size=vision_cfg["patch_size"],
            embed_dim=width,
            depth=vision_cfg["layers"],
            num_heads=width // vision_cfg["head_width"],
            mlp_ratio=vision_cfg["mlp_ratio"],
        )
        self.head = nn.Sequential()
