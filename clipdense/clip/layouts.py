"""Layouts of CLIP weight files, and the model config that their tensors determine."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from clipdense.checkpoint import DropRule, Layout, count_parts, register_layout, shown_size
from clipdense.clip.convnext import CONVNEXT_CLIP
from clipdense.clip.eva import EVA02_CLIP

# Only TorchScript state dicts have these entries.
JIT_ENTRIES = ("input_resolution", "context_length", "vocab_size")
_ROOT_TEXT = ("transformer.", "token_embedding.", "ln_final.", "positional_embedding", "text_projection")
# Early files lack the counters of BatchNorm, which only matter for momentum=None.
_COUNTERS = r".*\.num_batches_tracked"
_LOGITS = ("logit_scale", "logit_bias")

MASK_PROMPTS = "visual.mask_embedding"
"""Key of mask prompts (depth, h * w or 1, C) in the file of a CLIP that was adapted to masks."""
_MASK_PROMPTS = DropRule("mask prompts", re.escape(MASK_PROMPTS), "load_mask_prompts reads them")


def _scalar_logits(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {k: v.reshape(()) if k in _LOGITS and v.numel() == 1 else v for k, v in state.items()}


def _from_openai(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return _scalar_logits({f"text.{k}" if k.startswith(_ROOT_TEXT) else k: v for k, v in state.items()})


OPENAI_CLIP = register_layout(
    Layout(
        name="openai_clip",
        about="OpenAI CLIP, open_clip without custom_text: visual.*, transformer.*, token_embedding.*",
        matches=lambda state: (
            "token_embedding.weight" in state and any(k.startswith("visual.") for k in state)
        ),
        convert=_from_openai,
        drops=(
            DropRule("torchscript scalars", "|".join(JIT_ENTRIES), "sizes that the tensors show anyway"),
            _MASK_PROMPTS,
        ),
        optional=_COUNTERS,
    )
)


def _is_eva(state: Mapping[str, Tensor]) -> bool:
    return "visual.cls_token" in state and "visual.pos_embed" in state


# Names in a block, EVA-CLIP's -> timm's for blocks with separate query, key and value projections.
_EVA_NAMES = {
    "attn.q_bias": "attn.q_proj.bias",
    "attn.v_bias": "attn.v_proj.bias",
    "attn.inner_attn_ln.": "attn.norm.",
    "mlp.ffn_ln.": "mlp.norm.",
    "mlp.w1.": "mlp.fc1_g.",
    "mlp.w2.": "mlp.fc1_x.",
    "mlp.w3.": "mlp.fc2.",
}


def _from_eva(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the keys of EVA-CLIP; blocks with a fused projection keep the names of their biases."""
    converted = {}
    fused = "visual.blocks.0.attn.q_proj.weight" not in state
    for key, value in state.items():
        name = key
        if key == "text.logit_scale" and "logit_scale" not in state:
            name = "logit_scale"
        elif key.startswith("visual."):
            name = f"visual.trunk.{key.removeprefix('visual.')}"
            for theirs, ours in _EVA_NAMES.items():
                if f".{theirs}" in name and not (fused and theirs.endswith("_bias")):
                    name = name.replace(theirs, ours)
        converted[name] = value
    return _scalar_logits(converted)


EVA_CLIP = register_layout(
    Layout(
        name="eva_clip",
        about="EVA-CLIP, and what CLIPSelf trains of it: visual.cls_token, visual.blocks.*, text.*",
        matches=_is_eva,
        convert=_from_eva,
        drops=(
            DropRule(
                "RoPE tables",
                r"visual\.trunk\.(blocks\.\d+\.attn\.)?rope\.(flag|freqs_(cos|sin)(_\d+)?)",
                "computed for every grid",
            ),
        ),
    )
)

OPEN_CLIP = register_layout(
    Layout(
        name="open_clip",
        about="open_clip models with custom_text, and files that clipdense writes: visual.*, text.*",
        matches=lambda state: (
            any(k.startswith("visual.") for k in state)
            and any(k.startswith("text.") for k in state)
            and not _is_eva(state)
        ),
        convert=_scalar_logits,
        drops=(_MASK_PROMPTS,),
        optional=_COUNTERS,
    )
)


def config_from_tensors(
    state: Mapping[str, Tensor], *, head_width: int, text_heads: int | None
) -> dict[str, Any]:
    """Return the open_clip model config that converted tensors of any size show.

    Args:
        state: tensors of a ModifiedResNet, open_clip ViT or EVA02-CLIP, with our keys.
        head_width: width of a head of the image tower, which tensors do not show.
        text_heads: number of heads of the text tower; None: heads of width ``head_width``.

    Raises:
        ValueError: If the tensors are of another family, or the position grid is not square.
    """
    shape = {key: tuple(value.shape) for key, value in state.items()}
    if "visual.attnpool.positional_embedding" in shape:
        vision: dict[str, Any] = {
            "layers": [len(_children(shape, f"visual.layer{i}.")) for i in (1, 2, 3, 4)],
            "width": shape["visual.layer1.0.conv1.weight"][0],
            "patch_size": None,
            "image_size": _side(shape["visual.attnpool.positional_embedding"][0]) * 32,
        }
    elif "visual.class_embedding" in shape and "visual.proj" in shape:
        patch = shape["visual.conv1.weight"][-1]
        vision = {
            "layers": len(_children(shape, "visual.transformer.resblocks.")),
            "width": shape["visual.conv1.weight"][0],
            "patch_size": patch,
            "image_size": _side(shape["visual.positional_embedding"][0]) * patch,
            "mlp_ratio": _mlp_ratio(shape, "visual.transformer"),
        }
    elif "visual.trunk.blocks.0.attn.norm.weight" in shape:
        vision = {"timm_pool": "token", "timm_proj": None, **eva_vision_config(state)}
    else:
        raise ValueError(
            "the tensors do not determine the image tower (only those of CLIP's ResNet and ViT, and of "
            "EVA02-CLIP B and L, do): name the model"
        )
    attended = vision["width"] * (32 if vision["patch_size"] is None else 1)
    _check_heads("image", attended, attended // head_width)
    text = text_config(state, text_heads, head_width)
    return {
        "embed_dim": shape["text.text_projection"][1],
        "custom_text": True,
        "vision_cfg": {**vision, "head_width": head_width},
        "text_cfg": text,
    }


def text_config(
    state: Mapping[str, Tensor], text_heads: int | None = None, head_width: int = 64
) -> dict[str, Any]:
    """Return open_clip's `text_cfg` of a converted text transformer.

    Args:
        state: tensors with our keys; those of other modules are ignored.
        text_heads: number of heads, which tensors do not show; None: heads of width ``head_width``.
        head_width: see ``text_heads``.

    Raises:
        ValueError: If the tensors are of another family, or the width cannot be split into heads.
    """
    shape = {key: tuple(value.shape) for key, value in state.items() if key.startswith("text.")}
    if "text.text_projection" not in shape:
        raise ValueError("the tensors do not determine the text tower: name the model")
    width, _ = shape["text.text_projection"]
    heads = text_heads or width // head_width
    _check_heads("text", width, heads)
    return {
        "context_length": shape["text.positional_embedding"][0],
        "vocab_size": shape["text.token_embedding.weight"][0],
        "width": width,
        "heads": heads,
        "layers": len(_children(shape, "text.transformer.resblocks.")),
        "mlp_ratio": _mlp_ratio(shape, "text.transformer"),
    }


def _check_heads(what: str, width: int, heads: int) -> None:
    if not heads or width % heads:
        raise ValueError(
            f"width {width} of the {what} attention cannot be split into heads: "
            f"pass head_width and text_heads"
        )


def convnext_vision_config(state: Mapping[str, Tensor], image_size: int) -> dict[str, Any]:
    """Return open_clip's `vision_cfg` of a ConvNeXt image tower.

    Args:
        state: tensors with our keys; those of other modules are ignored.
        image_size: native size in pixels, which tensors do not show.

    Raises:
        CheckpointError: If the tensors that show a size are missing.
    """
    stages = range(count_parts(state, "visual.trunk.stages."))
    prefix = "visual.trunk.stages.{}.blocks."
    return {
        "timm_model_name": CONVNEXT_CLIP,
        "layers": [count_parts(state, prefix.format(i)) for i in stages],
        "widths": [shown_size(state, (f"{prefix.format(i)}0.conv_dw.weight", 0)) for i in stages],
        "timm_proj": "mlp" if "visual.head.mlp.fc1.weight" in state else "linear",
        "image_size": image_size,
    }


def eva_vision_config(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return open_clip's `vision_cfg` of a converted EVA02-CLIP image tower, without `head_width`.

    Args:
        state: tensors under the names that `EVA_CLIP` converts to; those of other modules are ignored.

    Raises:
        CheckpointError: If the tensors that show a size are missing.
        ValueError: If the position grid is not square.
    """
    trunk = "visual.trunk."
    mlp = f"{trunk}blocks.0.mlp."
    width = shown_size(state, (f"{trunk}norm.weight", 0), (f"{trunk}cls_token", 2))
    patch = shown_size(state, (f"{trunk}patch_embed.proj.weight", 3))
    hidden = shown_size(state, *((f"{mlp}{x}", 0) for x in ("fc1_g.bias", "fc1_x.bias", "fc1_g.weight")))
    return {
        "timm_model_name": EVA02_CLIP,
        "layers": count_parts(state, f"{trunk}blocks."),
        "width": width,
        "patch_size": patch,
        "image_size": _side(shown_size(state, (f"{trunk}pos_embed", 1))) * patch,
        "mlp_ratio": math.ceil(1e4 * hidden / width) / 1e4,  # timm truncates width * mlp_ratio
    }


def _children(shape: Mapping[str, Any], prefix: str) -> set[str]:
    return {key.removeprefix(prefix).split(".")[0] for key in shape if key.startswith(prefix)}


def _mlp_ratio(shape: Mapping[str, tuple[int, ...]], transformer: str) -> float:
    hidden, width = shape[f"{transformer}.resblocks.0.mlp.c_fc.weight"]
    return hidden / width


def _side(rows: int) -> int:
    side = math.isqrt(rows - 1)
    if side * side != rows - 1:
        raise ValueError(
            f"a position table of {rows} rows is not of a square image: name the model and its image_size"
        )
    return side
