"""Conversion of published CAT-Seg models (Cho et al., CVPR 2024), which contain their fine-tuned CLIP.

Sizes are read from the tensors. The heads of the attentions, the tapped blocks and the inference are those of
the released configs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from clipdense.checkpoint import (
    CheckpointError,
    DropRule,
    ModelLayout,
    config_leaves,
    count_parts,
    register_layout,
    rename,
    shown_size,
)
from clipdense.clip.layouts import OPENAI_CLIP, config_from_tensors
from clipdense.open_vocabulary import training_metadata

__all__ = ["CATSEG", "CLIP", "COST", "DOUBLE_CONV", "GUIDANCE", "TEMPLATES", "clip_prefixes"]

State = Mapping[str, Tensor]

GUIDANCE = {12: [3, 7], 24: [7, 15]}
"""Tapped blocks of the released models, by depth of the image tower."""
TEMPLATES = {1: "single_scene", 80: "clip_80"}
"""Prompt templates of the released models, by their number."""

_HEAD = "sem_seg_head.predictor."
CLIP, COST = f"{_HEAD}clip_model.", f"{_HEAD}transformer."
"""Prefixes of the file's CLIP, and of its aggregator."""
DOUBLE_CONV = {"0": "conv1", "1": "norm1", "3": "conv2", "4": "norm2"}
"""Layers of a `DoubleConv` by their positions in the file."""
_WINDOW_MASK = r"aggregator\.layers\.\d+\.spatial\.blocks\.\d+\.attn_mask"
_PROJECTIONS = ("q_proj_weight", "k_proj_weight", "v_proj_weight")


def clip_prefixes() -> dict[str, str]:
    """Return the key prefixes of the file's CLIP -> those of the model's."""
    return {
        CLIP: "clip.text.",
        f"{CLIP}logit_scale": "clip.logit_scale",
        f"{CLIP}visual.": "clip.visual.",
    }


def _prefixes(state: State) -> dict[str, str]:
    layers = range(count_parts(state, f"{COST}layers."))
    stages = range(count_parts(state, f"{COST}decoder_guidance_projection."))
    prefixes = {
        **clip_prefixes(),
        "upsample1.": "guidance_upsampling.0.",
        "upsample2.": "guidance_upsampling.1.",
        f"{COST}conv1.": "aggregator.cost_embedding.",
        f"{COST}guidance_projection.0.": "aggregator.image_guidance.",
        f"{COST}text_guidance_projection.0.": "aggregator.text_guidance.",
        f"{COST}head.": "aggregator.decoder.head.",
    }
    for i in stages:
        theirs, ours = f"{COST}decoder{i + 1}.", f"aggregator.decoder.stages.{i}."
        prefixes |= {f"{COST}decoder_guidance_projection.{i}.0.": f"aggregator.decoder_guidance.{i}."}
        prefixes |= {f"{theirs}up.": f"{ours}up."}
        prefixes |= {f"{theirs}conv.double_conv.{n}.": f"{ours}conv.{x}." for n, x in DOUBLE_CONV.items()}
    for i in layers:
        theirs, ours = f"{COST}layers.{i}.", f"aggregator.layers.{i}."
        prefixes |= {
            f"{theirs}swin_block.guidance_norm.": f"{ours}spatial.guidance_norm.",
            f"{theirs}swin_block.block_1.": f"{ours}spatial.blocks.0.",
            f"{theirs}swin_block.block_2.": f"{ours}spatial.blocks.1.",
            f"{theirs}attention.": f"{ours}classes.",
            f"{theirs}attention.attention.": f"{ours}classes.",
            f"{theirs}attention.MLP.0.": f"{ours}classes.mlp.fc1.",
            f"{theirs}attention.MLP.2.": f"{ours}classes.mlp.fc2.",
        }
    return prefixes


def _convert(state: State) -> dict[str, Tensor]:
    prefixes = _prefixes(state)
    return {rename(key, prefixes): value for key, value in _fuse_projections(state).items()}


def _fuse_projections(state: State) -> dict[str, Tensor]:
    """Concatenate the query, key and value projections, which CAT-Seg stores apart, to CLIP's own tensors."""
    fused = {}
    for key, value in state.items():
        stem, _, name = key.rpartition(".")
        if not key.startswith(CLIP) or name not in _PROJECTIONS:
            fused[key] = value
            continue
        parts = [state.get(f"{stem}.{projection}") for projection in _PROJECTIONS]
        if any(part is None for part in parts):
            raise CheckpointError(f"{stem} lacks one of {', '.join(_PROJECTIONS)}")
        fused[f"{stem}.in_proj_weight"] = torch.cat([part for part in parts if part is not None])
    return fused


def _clip_config(state: State) -> dict[str, Any]:
    """Return open_clip's model_cfg of the file's CLIP."""
    clip = {key.removeprefix(CLIP): value for key, value in state.items() if key.startswith(CLIP)}
    try:
        text_width = shown_size(clip, ("ln_final.weight", 0), ("token_embedding.weight", 1))
        heads = max(1, text_width // 64)
        config = config_from_tensors(OPENAI_CLIP.convert(clip), head_width=64, text_heads=heads)
    except (ValueError, KeyError) as error:
        raise CheckpointError(f"its CLIP is incomplete ({error})") from error
    return {**config, "quick_gelu": True}


def _grid(state: State) -> tuple[int, int]:
    """Return the side of the dense map and of the attention windows, as the stored window masks show."""
    masks = [v for k, v in state.items() if k.startswith(COST) and k.endswith("attn_mask")]
    if not masks:
        return 24, 12
    windows, positions = masks[0].shape[:2]
    side = math.isqrt(positions)
    return math.isqrt(windows) * side, side


def _options(state: State, classes: Sequence[str] | None) -> dict[str, Any]:
    config = _clip_config(state)
    depth, patch = config["vision_cfg"]["layers"], config["vision_cfg"]["patch_size"]
    grid, window = _grid(state)
    prompts = shown_size(state, (f"{COST}conv1.weight", 1))
    stages = range(count_parts(state, f"{COST}decoder_guidance_projection."))
    projections = [f"{COST}decoder_guidance_projection.{i}.0.weight" for i in stages]
    templates = {"MODEL.CAT_SEG.TEMPLATES": TEMPLATES[prompts]} if prompts in TEMPLATES else {}
    return {
        "MODEL.META_ARCHITECTURE": "CATSeg",
        "INPUT.FORMAT": "RGB",
        "MODEL.CLIP.PRETRAINED": "random",
        "MODEL.CLIP.POSITION_RULE": "bicubic",
        "MODEL.CLIP.POSITION_GRID": 0,
        **dict(config_leaves(config, "MODEL.CLIP.CONFIG")),
        "MODEL.CAT_SEG.RESOLUTION": grid * patch,
        "MODEL.CAT_SEG.DENSE": "catseg",
        "MODEL.CAT_SEG.GUIDANCE": GUIDANCE.get(depth) or [max(depth // 3 - 1, 0), 2 * depth // 3 - 1],
        "MODEL.CAT_SEG.GUIDANCE_DIMS": [shown_size(state, (key, 1)) for key in projections],
        "MODEL.CAT_SEG.DECODER_GUIDANCE_DIMS": [shown_size(state, (key, 0)) for key in projections],
        "MODEL.CAT_SEG.DECODER_DIMS": [
            shown_size(state, (f"{COST}decoder{i + 1}.conv.double_conv.0.weight", 0)) for i in stages
        ],
        **templates,
        "MODEL.CAT_SEG.SYNONYMS": "first",
        "MODEL.CAT_SEG.HIDDEN_DIM": shown_size(state, (f"{COST}conv1.weight", 0)),
        "MODEL.CAT_SEG.LAYERS": count_parts(state, f"{COST}layers."),
        "MODEL.CAT_SEG.WINDOW": window,
        "MODEL.CAT_SEG.IMAGE_GUIDANCE_DIM": shown_size(state, (f"{COST}guidance_projection.0.weight", 0)),
        "MODEL.CAT_SEG.TEXT_GUIDANCE_DIM": shown_size(state, (f"{COST}text_guidance_projection.0.weight", 0)),
        "MODEL.CAT_SEG.MAX_CLASSES": 256,
        "MODEL.CAT_SEG.POOLING": [6, 6] if prompts == 80 else [2, 2],
        "MODEL.CAT_SEG.IGNORED_PIXELS": "negative",
        "MODEL.CAT_SEG.SQUEEZE_PADDING": True,
        "MODEL.CAT_SEG.TEST.POOLING": [1, 1],
        "MODEL.CAT_SEG.TEST.WINDOWS.ENABLED": True,
        "MODEL.CAT_SEG.TEST.WINDOWS.IMAGE_SIZE": 640,
        "MODEL.CAT_SEG.TEST.WINDOWS.SIZE": 384,
        "MODEL.CAT_SEG.TEST.WINDOWS.STRIDE": 256,
    }


CATSEG = register_layout(
    ModelLayout(
        name="catseg",
        about=f"CAT-Seg as Detectron2 saves it: {COST}*, {CLIP}*, upsample1.*",
        matches=lambda state: f"{COST}conv1.weight" in state and "upsample1.weight" in state,
        convert=_convert,
        options=_options,
        prefixes=_prefixes,
        # the file does not name its classes; the released models were trained on all of COCO-Stuff
        metadata=lambda *_: training_metadata(None),
        drops=(DropRule("window masks", _WINDOW_MASK, "computed for each grid"),),
    )
)
