"""Configs of text-aligned DINO models, in the form of open_clip's hub configs."""

from __future__ import annotations

from typing import Any, Literal

from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

__all__ = ["ALIGNED_MODELS", "Part"]

Part = Literal["patches", "image"]
"""What a model compares with texts."""


def _config(embed_dim: int, vision: dict[str, Any], text: dict[str, Any], quick_gelu: bool) -> dict[str, Any]:
    statistics = {"mean": list(IMAGENET_DEFAULT_MEAN), "std": list(IMAGENET_DEFAULT_STD)}
    model = {"embed_dim": embed_dim, "quick_gelu": quick_gelu, "vision_cfg": vision, "text_cfg": text}
    return {"model_cfg": model, "preprocess_cfg": statistics}


def _dinotxt(trunk: str, size: int, part: Part) -> dict[str, Any]:
    vision = {"dino_trunk": trunk, "image_size": size, "head_layers": 2, "head_hidden": 2752, "part": part}
    text = {"context_length": 77, "vocab_size": 49408, "width": 1280, "heads": 20, "layers": 24}
    return _config(1024 if part == "patches" else 2048, vision, text | {"embed_dim": 2048}, False)


def _talk2dino(trunk: str, dim: int) -> dict[str, Any]:
    vision = {"dino_trunk": trunk, "image_size": 518, "head_layers": 0, "part": "patches"}
    text = {"context_length": 77, "vocab_size": 49408, "width": 512, "heads": 8, "layers": 12}
    return _config(dim, vision, text | {"embed_dim": 512}, True)


_V2, _V3 = "vit_large_patch14_reg4_dinov2", "vit_large_patch16_dinov3_qkvb"

ALIGNED_MODELS: dict[str, dict[str, Any]] = {
    "dinotxt-vitl14-reg4": _dinotxt(_V2, 518, "patches"),
    "dinotxt-vitl14-reg4-image": _dinotxt(_V2, 518, "image"),
    "dinotxt-dinov3-vitl16": _dinotxt(_V3, 256, "patches"),
    "dinotxt-dinov3-vitl16-image": _dinotxt(_V3, 256, "image"),
    "talk2dino-vitb14-reg4": _talk2dino("vit_base_patch14_reg4_dinov2", 768),
    "talk2dino-vitl14-reg4": _talk2dino(_V2, 1024),
}
"""Model name -> config, in the form of open_clip's hub configs. The names with -image compare whole images
(class token and mean of the patches) and have no dense map."""
