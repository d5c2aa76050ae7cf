"""Conversion of published SED models (Xie et al., CVPR 2024), which contain their fine-tuned CLIP.

Sizes are read from the tensors. The heads of the attentions and the size of the images are those of the
released configs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from clipdense.checkpoint import (
    CheckpointError,
    ModelLayout,
    config_leaves,
    count_parts,
    register_layout,
    rename,
    shown_size,
)
from clipdense.clip.layouts import OPENAI_CLIP, convnext_vision_config, text_config
from clipdense.open_vocabulary import training_metadata
from clipdense.systems.catseg.convert import CLIP, COST, DOUBLE_CONV, TEMPLATES, clip_prefixes

__all__ = ["SED_LAYOUT"]

State = Mapping[str, Tensor]

_CLIP_SIZE = 320  # native image size of both released ConvNeXts
_BLOCK = {
    "gamma": "gamma",
    "dwconv.": "conv_dw.",
    "norm.": "norm.",
    "pwconv1.": "mlp.fc1.",
    "pwconv2.": "mlp.fc2.",
}


def _stages(state: State) -> range:
    return range(count_parts(state, f"{COST}decoder_guidance_projection."))


def _prefixes(state: State) -> dict[str, str]:
    prefixes = {
        **clip_prefixes(),
        f"{COST}conv1.": "aggregator.cost_embedding.",
        f"{COST}head.": "aggregator.head.",
    }
    for i in _stages(state):
        theirs, ours = f"{COST}decoder{i + 1}.", f"aggregator.stages.{i}."
        prefixes |= {
            f"{COST}decoder_guidance_projection.{i}.0.": f"aggregator.decoder_guidance.{i}.",
            f"{COST}decoder_corr_guidance_projection.{i}.0.": f"aggregator.cost_guidance.{i}.",
            f"{COST}head{i}.": f"aggregator.rejection_heads.{i}.",
            f"{theirs}up.": f"{ours}up.",
            f"{theirs}attention.": f"{ours}classes.",
            f"{theirs}attention.attention.": f"{ours}classes.",
            f"{theirs}attention.MLP.0.": f"{ours}classes.mlp.fc1.",
            f"{theirs}attention.MLP.2.": f"{ours}classes.mlp.fc2.",
        }
        prefixes |= {f"{theirs}conv.double_conv.{n}.": f"{ours}conv.{x}." for n, x in DOUBLE_CONV.items()}
        prefixes |= {f"{theirs}cnext.{a}": f"{ours}block.{b}" for a, b in _BLOCK.items()}
    return prefixes


def _convert(state: State) -> dict[str, Tensor]:
    prefixes = _prefixes(state)
    return {rename(key, prefixes): value for key, value in state.items()}


def _options(state: State, classes: Sequence[str] | None) -> dict[str, Any]:
    stages, prompts = _stages(state), shown_size(state, (f"{COST}conv1.weight", 1))
    clip = {key.removeprefix(CLIP): value for key, value in state.items() if key.startswith(CLIP)}
    clip = OPENAI_CLIP.convert(clip)
    try:
        width = shown_size(clip, ("text.ln_final.weight", 0), ("text.token_embedding.weight", 1))
        config = {
            "embed_dim": shown_size(clip, ("text.text_projection", 1)),
            "custom_text": True,
            "quick_gelu": False,
            "vision_cfg": convnext_vision_config(clip, _CLIP_SIZE),
            "text_cfg": text_config(clip, max(1, width // 64)),
        }
    except (ValueError, KeyError) as error:
        raise CheckpointError(f"its CLIP is incomplete ({error})") from error
    templates = {"MODEL.CAT_SEG.TEMPLATES": TEMPLATES[prompts]} if prompts in TEMPLATES else {}
    return {
        "MODEL.META_ARCHITECTURE": "SED",
        "INPUT.FORMAT": "RGB",
        "MODEL.CLIP.PRETRAINED": "random",
        **dict(config_leaves(config, "MODEL.CLIP.CONFIG")),
        "MODEL.CAT_SEG.RESOLUTION": 768,
        "MODEL.CAT_SEG.DENSE": "plain",
        "MODEL.CAT_SEG.GUIDANCE": [4, 3, 2],
        "MODEL.CAT_SEG.FINETUNE": "image",
        "MODEL.CAT_SEG.DECODER_GUIDANCE_DIMS": [
            shown_size(state, (f"{COST}decoder_guidance_projection.{i}.0.weight", 0)) for i in stages
        ],
        "MODEL.CAT_SEG.DECODER_DIMS": [
            shown_size(state, (f"{COST}decoder{i + 1}.conv.double_conv.0.weight", 0)) for i in stages
        ],
        "MODEL.CAT_SEG.KERNELS": [
            shown_size(state, (f"{COST}decoder{i + 1}.cnext.dwconv.weight", 2)) for i in stages
        ],
        **templates,
        "MODEL.CAT_SEG.SYNONYMS": "mean",
        "MODEL.CAT_SEG.HIDDEN_DIM": shown_size(state, (f"{COST}conv1.weight", 0)),
        "MODEL.CAT_SEG.POOLING": [2, 2],
        "MODEL.CAT_SEG.IGNORED_PIXELS": "negative",
        "MODEL.CAT_SEG.SQUEEZE_PADDING": False,
        "MODEL.CAT_SEG.TEST.POOLING": [1, 1],
        "MODEL.CAT_SEG.TEST.WINDOWS.ENABLED": False,
    }


SED_LAYOUT = register_layout(
    ModelLayout(
        name="sed",
        about=f"SED as Detectron2 saves it: {COST}decoder1.cnext.*, {CLIP}visual.trunk.*",
        matches=lambda state: f"{COST}decoder1.cnext.gamma" in state,
        convert=_convert,
        options=_options,
        prefixes=_prefixes,
        # the file does not name its classes; the released models were trained on all of COCO-Stuff
        metadata=lambda *_: training_metadata(None),
    )
)
