"""The nano CLIPs of the embedded `shapes` world: four image towers that share one text tower.

Each is one json file in open_clip's hub format (`model_cfg`, `preprocess_cfg`) and weights in two
safetensors files: `<name>.safetensors` holds `visual.*`, `logit_scale` and, for SigLIP, `logit_bias`;
`shapes-text.safetensors` holds `text.*`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

from timm.models import register_model
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer

__all__ = ["NANO_MODELS", "nano_config", "nano_files", "nano_path"]

NANO_MODELS = ("shapes-rn", "shapes-vit", "shapes-eva", "shapes-siglip")
_ROOM = Path(__file__).parent
_SIZE = {"img_size": 64, "patch_size": 8, "embed_dim": 128, "depth": 4, "num_heads": 4}


@register_model  # type: ignore[untyped-decorator]  # open_clip builds an EVA tower by its timm name
def shapes_eva02_patch8_clip_64(pretrained: bool = False, **kwargs: Any) -> Eva:
    """EVA02-CLIP (RoPE, SwiGLU, sub-norms) at 64 px: 4 blocks of width 128, patch 8."""
    settings: dict[str, Any] = {
        **_SIZE,
        "qkv_fused": False,
        "mlp_ratio": 4 * 2 / 3,
        "swiglu_mlp": True,
        "scale_mlp": True,
        "scale_attn_inner": True,
        "use_rot_pos_emb": True,
        "ref_feat_shape": (8, 8),
        "global_pool": "token",
        "head_init_scale": 1.0,  # timm's 0.001 is for fine-tuning a classifier
    }
    return Eva(**{**settings, **_without_files(kwargs)})


@register_model  # type: ignore[untyped-decorator]
def shapes_vit_patch8_siglip_64(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """SigLIP (no class token, attention-pooling head) at 64 px: 4 blocks of width 128, patch 8."""
    settings: dict[str, Any] = {
        **_SIZE,
        "class_token": False,
        "global_pool": "map",
        "weight_init": "jax",  # timm's deviation of 0.02 is for wider models
    }
    return VisionTransformer(**{**settings, **_without_files(kwargs)})


def _without_files(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments that timm passes to a model, without those on its weight files."""
    files = {"pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"}
    return {key: value for key, value in kwargs.items() if key not in files}


def nano_config(name: str) -> dict[str, Any]:
    """Return the open_clip hub config (`model_cfg`, `preprocess_cfg`) of a nano model."""
    return cast(dict[str, Any], json.loads((_ROOM / f"{name}.json").read_text()))


def nano_path(name: str) -> Path:
    """Return the path of the weights of a nano model's image tower, or of "shapes-text"."""
    return _ROOM / f"{name}.safetensors"


def nano_files(name: str) -> list[Path]:
    """Return the weight files of a nano model: image tower, then text tower.

    Raises:
        FileNotFoundError: If a file is not in the package.
    """
    files = [nano_path(name), nano_path("shapes-text")]
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(
                f"the weights of '{name}' are missing: {file}. Reinstall the package, train them with "
                f"tools/train_net.py --config-file configs/shapes/clip_*.yaml, or pass pretrained='random'."
            )
    return files
