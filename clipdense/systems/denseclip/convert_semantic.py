"""Conversion of the published DenseCLIP segmentors: mmsegmentation's Semantic FPN on CLIP's towers.

Sizes are read from the tensors. Settings that tensors do not determine are those of the released configs:
numbers of heads, blocks of the ViT that the pyramid reads, temperature, weight of the auxiliary loss, sliding
windows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from clipdense.checkpoint import ModelLayout, count_parts, register_layout, rename, shown_size
from clipdense.systems.denseclip.convert import (
    language_options,
    language_prefixes,
    neck_prefixes,
    resnet_config,
    text_config,
)

__all__ = ["DENSECLIP_SEMANTIC_FPN"]

State = Mapping[str, Tensor]

_VIT_HEADS = 12
_VIT_BLOCKS = [3, 5, 7, 11]
_HEAD = "decode_head.scale_heads."


def _is_segmentor(state: State) -> bool:
    prefixes = ("backbone.", "text_encoder.", "context_decoder.", "neck.", "decode_head.")
    return all(any(key.startswith(prefix) for key in state) for prefix in prefixes)


def _is_vit(state: State) -> bool:
    return any(key.startswith("backbone.transformer.") for key in state)


def _prefixes(state: State) -> dict[str, str]:
    levels = range(count_parts(state, "neck.lateral_convs."))
    prefixes = {
        **language_prefixes(),
        **neck_prefixes(len(levels), first=2),
        "decode_head.conv_seg.": "sem_seg_head.predictor.",
    }
    for i in levels:
        for j in range(count_parts(state, f"{_HEAD}{i}.")):
            prefixes[f"{_HEAD}{i}.{j}.conv."] = f"sem_seg_head.p{2 + i}.{j}."
            prefixes[f"{_HEAD}{i}.{j}.bn."] = f"sem_seg_head.p{2 + i}.{j}.norm."
        if _is_vit(state):
            # a level with nothing but its norm is no sequence in the published file
            single = f"backbone.fpn{i + 1}.weight" in state
            target = f"backbone.bottom_up.trunk.levels.{i}."
            prefixes[f"backbone.fpn{i + 1}."] = f"{target}0." if single else target
    return prefixes


def _convert(state: State) -> dict[str, Tensor]:
    prefixes = _prefixes(state)
    return {rename(key, prefixes): value for key, value in state.items()}


def _options(state: State, classes: Sequence[str] | None) -> dict[str, Any]:
    num_classes = shown_size(state, ("decode_head.conv_seg.bias", 0), ("decode_head.conv_seg.weight", 0))
    clip = _vit_config(state) if _is_vit(state) else resnet_config(state)
    return {
        "MODEL.META_ARCHITECTURE": "DenseCLIPSemanticSegmentor",
        **language_options(state, clip, num_classes, classes),
        **(_vit_options(state, clip) if _is_vit(state) else _resnet_options()),
        "MODEL.CLIP.POSITION_RULE": "bilinear",
        "MODEL.LANGUAGE.CLASSES_FROM": "stuff_classes",
        "MODEL.LANGUAGE.SCORE": "cosine",
        "MODEL.LANGUAGE.LAST_MAP": "trunk",
        "MODEL.FPN.IN_FEATURES": ["res2", "res3", "res4", "res5"],
        "MODEL.FPN.TOP_BLOCK": "",
        "MODEL.FPN.PAD": False,
        "MODEL.SEM_SEG_HEAD.NAME": "SemanticFPNHead",
        "MODEL.SEM_SEG_HEAD.IN_FEATURES": ["p2", "p3", "p4", "p5"],
        "MODEL.SEM_SEG_HEAD.NUM_CLASSES": num_classes,
        "MODEL.SEM_SEG_HEAD.CONVS_DIM": shown_size(
            state, ("decode_head.conv_seg.weight", 1), (f"{_HEAD}0.0.conv.weight", 0)
        ),
        "MODEL.SEM_SEG_HEAD.NORM": "BN",
        "MODEL.SEM_SEG_HEAD.COMMON_STRIDE": 4,
        "MODEL.SEM_SEG_HEAD.IGNORE_VALUE": 255,
        "MODEL.SEM_SEG_HEAD.LOSS_AVERAGE": "all",
        "MODEL.SEMANTIC_SEGMENTOR.PAD": False,
        "MODEL.PIXEL_TEXT.SOURCE": "sem_seg",
        "MODEL.PIXEL_TEXT.WEIGHT": 0.4,
    }


def _resnet_options() -> dict[str, Any]:
    return {
        "MODEL.LANGUAGE.TRUNK": "CLIPTrunk",
        "MODEL.SEMANTIC_SEGMENTOR.WINDOW": [512, 512],
        "MODEL.SEMANTIC_SEGMENTOR.STRIDE": [341, 341],
    }


def _vit_options(state: State, clip: dict[str, Any]) -> dict[str, Any]:
    levels = count_parts(state, "neck.lateral_convs.")
    patch = clip["vision_cfg"]["patch_size"]
    return {
        "MODEL.LANGUAGE.TRUNK": "CLIPBlockTrunk",
        "MODEL.TRUNK.BLOCKS": _VIT_BLOCKS,
        "MODEL.INTERPOLATED.SCALE_FACTORS": [patch / (4 * 2**i) for i in range(levels)],
        "MODEL.INTERPOLATED.NORM": "BN",
        "MODEL.INTERPOLATED.GROUP_NORM": True,
        "MODEL.CLIP.DOUBLE_CLASS_EMBEDDING": True,
        "MODEL.SEMANTIC_SEGMENTOR.WINDOW": [640, 640],
        "MODEL.SEMANTIC_SEGMENTOR.STRIDE": [426, 426],
    }


def _vit_config(state: State) -> dict[str, Any]:
    """Return open_clip's model_cfg of the published towers, whose image tower is a ViT."""
    width = shown_size(state, ("backbone.class_embedding", 0), ("backbone.conv1.weight", 0))
    patch = shown_size(state, ("backbone.conv1.weight", 3))
    block = "backbone.transformer.resblocks.0.mlp.c_fc"
    return {
        **text_config(state, ("backbone.proj", 1)),
        "vision_cfg": {
            "layers": count_parts(state, "backbone.transformer.resblocks."),
            "width": width,
            "head_width": max(width // _VIT_HEADS, 1),
            "mlp_ratio": shown_size(state, (f"{block}.bias", 0), (f"{block}.weight", 0)) / width,
            "patch_size": patch,
            "image_size": patch * math.isqrt(shown_size(state, ("backbone.positional_embedding", 0))),
        },
    }


DENSECLIP_SEMANTIC_FPN = register_layout(
    ModelLayout(
        name="denseclip_semantic_fpn",
        about="DenseCLIP's segmentor as mmsegmentation saves it: backbone.*, text_encoder.*, decode_head.*",
        matches=_is_segmentor,
        classes="stuff_classes",
        convert=_convert,
        options=_options,
        prefixes=_prefixes,
    )
)
