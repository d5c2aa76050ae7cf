"""Conversion of published FC-CLIP models (Yu et al., NeurIPS 2023), whose files contain their frozen CLIP.

Sizes are read from the tensors. Settings that tensors do not show are those of the released configs: see
`clipdense.maskformer.convert` for the mask network, and `_options`.

Files of ODISE (Xu et al., CVPR 2023) are refused: they hold the trainable part only, on features of a
diffusion model, which clipdense does not have.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from torch import Tensor

from clipdense.checkpoint import (
    CheckpointError,
    DropRule,
    ModelLayout,
    config_leaves,
    count_parts,
    register_layout,
    rename,
)
from clipdense.clip.layouts import OPENAI_CLIP, config_from_tensors, convnext_vision_config, text_config
from clipdense.clip.vocabulary import Vocabulary
from clipdense.data.datasets.synonyms import add_synonyms
from clipdense.maskformer.convert import DROPS, head_options, head_prefixes
from clipdense.open_vocabulary import training_metadata

__all__ = ["FCCLIP_LAYOUT", "ODISE_LAYOUT"]

State = Mapping[str, Tensor]

_CLIP, _PREDICTOR = "backbone.clip_model.", "sem_seg_head.predictor."
_EMBED = "head.predictor.class_embed."
_DROPS = (
    *DROPS,
    DropRule("BatchNorm counters", r"backbone\.tower\..*\.num_batches_tracked", "the tower is frozen"),
)
CONVNEXT_SIZE = 320
"""Native size in pixels of the released ConvNeXt."""


def _prefixes(state: State) -> dict[str, str]:
    return {
        **head_prefixes(state),
        _CLIP: "clip.text.",
        f"{_CLIP}visual.": "backbone.tower.",
        f"{_CLIP}logit_scale": "clip.logit_scale",
        f"{_PREDICTOR}_mask_pooling_proj.": f"{_EMBED}pool_proj.",
        f"{_PREDICTOR}class_embed.": f"{_EMBED}mlp.",
        f"{_PREDICTOR}logit_scale": "classifier.logit_scale",
        "void_embedding.weight": "classifier.void",
    }


def _convert(state: State) -> dict[str, Tensor]:
    prefixes = _prefixes(state)
    ours = {rename(key, prefixes): value for key, value in state.items()}
    for key in ("clip.logit_scale", "classifier.logit_scale"):
        if key in ours and ours[key].numel() == 1:
            ours[key] = ours[key].reshape(())
    return ours


def _metadata(state: State, classes: Sequence[str] | None) -> dict[str, Any]:
    """Note the training classes, if as many names are known as the training loss has classes."""
    weight = state.get("criterion.empty_weight")
    if not classes or (weight is not None and len(weight) - 1 != len(classes)):
        return training_metadata(None)
    try:
        # the names of an evaluation may be the dataset's own or the longer lists
        return training_metadata(add_synonyms(Vocabulary.from_names(classes), keep=True))
    except ValueError as error:
        raise CheckpointError(f"names of classes: {error}") from error


def _options(state: State, classes: Sequence[str] | None) -> dict[str, Any]:
    """Derive the config keys; panoptic outputs and thresholds are those of the released configs."""
    ours = _convert(state)
    convnext = f"{_CLIP}visual.trunk.stem.0.weight" in state
    weight = state.get("criterion.empty_weight")
    test = {"SEMANTIC_ON": True, "PANOPTIC_ON": True, "INSTANCE_ON": True, "OBJECT_MASK_THRESHOLD": 0.0}
    return {
        "MODEL.META_ARCHITECTURE": "FCCLIP",
        **({} if weight is None else {"MODEL.SEM_SEG_HEAD.NUM_CLASSES": len(weight) - 1}),
        "INPUT.FORMAT": "RGB",
        "MODEL.PIXEL_MEAN": [255 * x for x in OPENAI_DATASET_MEAN],
        "MODEL.PIXEL_STD": [255 * x for x in OPENAI_DATASET_STD],
        **_clip_options(state, convnext),
        "MODEL.BACKBONE.NAME": "FrozenCLIPTrunk",
        "MODEL.FROZEN_CLIP.JOINT": "pooling",
        **head_options(ours),
        "MODEL.MASK_FORMER.TARGETS": "panoptic",
        **{f"MODEL.MASK_FORMER.TEST.{key}": value for key, value in test.items()},
        "MODEL.MASK_POOLING.TEMPLATES": "ovseg_14",
        "MODEL.MASK_POOLING.EMBED_LAYERS": count_parts(ours, f"{_EMBED}mlp.layers."),
        "MODEL.MASK_POOLING.ENSEMBLE.ALPHA": 0.4,
        "MODEL.MASK_POOLING.ENSEMBLE.BETA": 0.8,
        "MODEL.MASK_POOLING.ENSEMBLE.EMPTY": "pooled" if convnext else "in_vocabulary",
    }


def _clip_options(state: State, convnext: bool) -> dict[str, Any]:
    """Derive the options of the file's CLIP: a ConvNeXt with GELU, or OpenAI's ResNet with QuickGELU."""
    clip = {key.removeprefix(_CLIP): value for key, value in state.items() if key.startswith(_CLIP)}
    converted = OPENAI_CLIP.convert(clip)
    try:
        width, embed_dim = converted["text.text_projection"].shape
        heads = max(width // 64, 1)
        if convnext:
            config = {
                "embed_dim": embed_dim,
                "custom_text": True,
                "vision_cfg": convnext_vision_config(converted, CONVNEXT_SIZE),
                "text_cfg": text_config(converted, heads),
            }
        else:
            config = config_from_tensors(converted, head_width=64, text_heads=heads)
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"the frozen CLIP below {_CLIP}: {error}") from error
    return {
        "MODEL.CLIP.PRETRAINED": "random",
        "MODEL.CLIP.POSITION_RULE": "bilinear",
        "MODEL.CLIP.POSITION_GRID": 0,
        **dict(config_leaves({**config, "quick_gelu": not convnext}, "MODEL.CLIP.CONFIG")),
    }


def _refuse_odise(state: State, *_: Any) -> Any:
    raise CheckpointError(
        "it is ODISE's trainable part, without its backbone: the U-Net and the captioner of Stable Diffusion "
        "(backbone.feature_extractor.ldm_extractor) and its CLIP are not in the file, and clipdense has no "
        "diffusion model. Train ODISE's heads on a CLIP instead: projects/FCCLIP/README.md"
    )


FCCLIP_LAYOUT = register_layout(
    ModelLayout(
        name="fcclip",
        about=f"FC-CLIP as Detectron2 saves it: {_CLIP}*, void_embedding.weight",
        matches=lambda state: (
            "void_embedding.weight" in state and any(key.startswith(f"{_CLIP}visual.") for key in state)
        ),
        convert=_convert,
        options=_options,
        metadata=_metadata,
        prefixes=_prefixes,
        drops=_DROPS,
    )
)
ODISE_LAYOUT = register_layout(
    ModelLayout(
        name="odise",
        about="ODISE as its training saves it: sem_seg_head.predictor.post_mask_embed.*, without diffusion",
        matches=lambda state: any(".post_mask_embed." in key for key in state),
        convert=dict,
        options=_refuse_odise,
        prefixes=lambda state: {},
        licence="CC BY-NC-SA 4.0 (no commercial use)",
    )
)
