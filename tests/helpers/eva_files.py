"""Tiny files in the layout of EVA-CLIP's originals, which CLIPSelf uses as well."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from clipdense.clip.eva import EVA02_CLIP
from clipdense.clip.model import ClipModel, build_clip, load_clip

CONFIG: dict[str, Any] = {
    "embed_dim": 24,
    "vision_cfg": {
        "timm_model_name": EVA02_CLIP,
        "timm_pool": "token",
        "timm_proj": None,
        "layers": 2,
        "width": 176,  # 469 hidden, and 176 * (469 / 176) is a little less
        "head_width": 88,
        "patch_size": 8,
        "image_size": 32,
        "mlp_ratio": 2.6667,
    },
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}
PIXELS = {"mean": [0.5] * 3, "std": [0.5] * 3}
_NAMES = {
    "attn.q_proj.bias": "attn.q_bias",
    "attn.v_proj.bias": "attn.v_bias",
    "attn.norm.": "attn.inner_attn_ln.",
    "mlp.fc1_g.": "mlp.w1.",
    "mlp.fc1_x.": "mlp.w2.",
    "mlp.fc2.": "mlp.w3.",
    "mlp.norm.": "mlp.ffn_ln.",
    "visual.trunk.": "visual.",
}


def clip() -> ClipModel:
    torch.manual_seed(0)
    return build_clip("tiny", {"model_cfg": CONFIG, "preprocess_cfg": PIXELS}).eval()


def state(model: ClipModel) -> dict[str, Tensor]:
    """The model's tensors under EVA-CLIP's keys, RoPE tables among them."""
    renamed: dict[str, Tensor] = {}
    for key, value in model.state_dict().items():
        for ours, theirs in _NAMES.items():
            key = key.replace(ours, theirs)
        renamed[key] = value
    tables = {f"visual.{owner}rope.freqs_cos": torch.zeros(16, 88) for owner in ("", "blocks.1.attn.")}
    return {**renamed, **tables}


def load_golden(state: dict[str, Tensor], config: dict[str, Any], path: Path) -> ClipModel:
    """Load the EVA-CLIP of a golden file.

    Args:
        state: tensors under EVA-CLIP's keys.
        config: the file's ``config``, with ``vision`` and ``text``.
        path: a safetensors file to write on the way.
    """
    save_file(state, path)
    vision = config["vision"]
    clip = load_clip(path, head_width=vision["head_width"], text_heads=config["text"]["heads"])
    clip.visual.trunk.rope.ref_feat_shape = (vision["pt_hw_seq_len"],) * 2  # no file stores it
    return clip
