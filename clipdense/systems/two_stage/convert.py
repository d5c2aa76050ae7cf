"""Conversion of published OVSeg, zsseg and ZegFormer models. Their files also contain their CLIP, except some
of ZegFormer's.

Sizes are read from the tensors. Other settings are those of the released configs: see
`clipdense.maskformer.convert` for the proposals, and `_ovseg`, `_zsseg` and `_zegformer` for thresholds and
weights, which differ between published results.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
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
from clipdense.clip.vocabulary import Vocabulary
from clipdense.maskformer.convert import (
    DROPS,
    NON_COMMERCIAL,
    backbone_options,
    backbone_prefixes,
    head_options,
    head_prefixes,
)
from clipdense.open_vocabulary import training_metadata

__all__ = ["OVSEG", "ZEGFORMER", "ZEGFORMER_PROPOSALS", "ZSSEG"]

State = Mapping[str, Tensor]

_PREDICTOR, _ADAPTER = "sem_seg_head.predictor.", "clip_adapter."
_EMBED = "head.predictor.class_embed.layers."
_MASK_PROMPTS = f"{_ADAPTER}clip_model.visual.mask_embedding"
_PROMPT_LEARNER = f"{_ADAPTER}prompt_learner."
_ZEGFORMER_CLIP = f"{_PREDICTOR}clip_model."

_DROPS = (
    *DROPS,
    DropRule("CLIP's pixels", re.escape(_ADAPTER) + r"pixel_(mean|std)", "MODEL.CLIP sets them"),
    DropRule(
        "tokens of prompts",
        re.escape(_PROMPT_LEARNER) + r"(start|dot|end|pad)_signal",
        "the token table contains them",
    ),
)


def _clip_prefix(state: State) -> str:
    own = any(key.startswith(_ZEGFORMER_CLIP) for key in state)
    return _ZEGFORMER_CLIP if own else f"{_ADAPTER}clip_model."


def _clip_prefixes(state: State) -> dict[str, str]:
    theirs = _clip_prefix(state)
    return {
        theirs: "encoder.clip.text.",
        **{f"{theirs}{x}": f"encoder.clip.{x}" for x in ("visual.", "logit_scale")},
    }


def _prefixes(state: State) -> dict[str, str]:
    return {
        **backbone_prefixes(state),
        **head_prefixes(state),
        **_clip_prefixes(state),
        _MASK_PROMPTS: "encoder.mask_prompts.prompts",
        f"{_ADAPTER}non_object_embedding": "classifier.no_object",
        f"{_PREDICTOR}bg_feature": "classifier.no_object",
        f"{_PREDICTOR}logit_scale": "classifier.scale",
        f"{_PREDICTOR}projection_layer.": f"{_EMBED}0.",
        f"{_PROMPT_LEARNER}prefix_prompt": "prompts.prefix",
        f"{_PROMPT_LEARNER}suffix_prompt": "prompts.suffix",
    }


def _convert(state: State) -> dict[str, Tensor]:
    prefixes = _prefixes(state)
    ours = {rename(key, prefixes): value for key, value in state.items()}
    scale = ours.get("classifier.scale")
    ours["classifier.scale"] = torch.tensor(100.0) if scale is None else scale.float().exp().reshape(())
    if "encoder.mask_prompts.prompts" in ours and not len(ours["encoder.mask_prompts.prompts"]):
        del ours["encoder.mask_prompts.prompts"]
    names = ("prompts.prefix", "prompts.suffix")
    if learned := [ours[name] for name in names if name in ours]:  # an empty one has no key
        ours = dict.fromkeys(names, learned[0][:0]) | ours
    return ours


def _metadata(state: State, classes: Sequence[str] | None) -> dict[str, Any]:
    """Note the training classes, if as many names are known as the training loss has classes."""
    weight = state.get("criterion.empty_weight")
    if not classes or weight is None or len(weight) - 1 != len(classes):
        return training_metadata(None)
    try:
        return training_metadata(Vocabulary.from_names(classes, separator=None))
    except ValueError as error:
        raise CheckpointError(f"names of classes: {error}") from error


def _options(state: State, classes: Sequence[str] | None) -> dict[str, Any]:
    """Derive the options that the three systems share."""
    ours = _convert(state)
    prompts = ours.get("encoder.mask_prompts.prompts")
    weighted = "criterion.empty_weight" in state
    return {
        "MODEL.META_ARCHITECTURE": "OVSeg",
        **_clip_options(state),
        **({"MODEL.SEM_SEG_HEAD.NUM_CLASSES": len(state["criterion.empty_weight"]) - 1} if weighted else {}),
        **backbone_options(state),
        **head_options(ours),
        "MODEL.MASK_FORMER.NO_OBJECT_WEIGHT": 0.1 if weighted else 0.0,
        "MODEL.TWO_STAGE.EMBED_LAYERS": count_parts(ours, _EMBED),
        "MODEL.TWO_STAGE.EMBED_HIDDEN_DIM": shown_size(
            ours, (f"{_EMBED}0.bias", 0), (f"{_EMBED}0.weight", 0)
        ),
        "MODEL.TWO_STAGE.MASK_PROMPTS.DEPTH": 0 if prompts is None else len(prompts),
        "MODEL.TWO_STAGE.PROMPT_CONTEXT": [len(ours.get(f"prompts.{x}fix", ())) for x in ("pre", "suf")],
        "MODEL.TWO_STAGE.SCORES.EMPTY": "boost",
    }


def _clip_options(state: State) -> dict[str, Any]:
    """Derive the options of the file's CLIP; without one, of OpenAI's, whose weights MODEL.CLIP.PRETRAINED
    names."""
    prefix = _clip_prefix(state)
    clip = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    if not clip:
        return {"MODEL.CLIP.NAME": "ViT-B-16-quickgelu"}
    config = config_from_tensors(OPENAI_CLIP.convert(clip), head_width=64, text_heads=None)
    return {
        "MODEL.CLIP.PRETRAINED": "random",
        "MODEL.CLIP.POSITION_GRID": 0,
        **dict(config_leaves({**config, "quick_gelu": True}, "MODEL.CLIP.CONFIG")),
    }


def _ovseg(state: State, classes: Sequence[str] | None) -> dict[str, Any]:
    swin = "backbone.patch_embed.proj.weight" in state
    return _options(state, classes) | {
        "MODEL.TWO_STAGE.TEMPLATES": "ovseg_14",
        "MODEL.TWO_STAGE.CROP.THRESHOLD": 0.4 if swin else 0.5,
        "MODEL.TWO_STAGE.SCORES.FUSION": "ovseg",
        "MODEL.TWO_STAGE.SCORES.ALPHA": 0.7,
        "MODEL.TWO_STAGE.SCORES.BETA": 0.7,
    }


def _zsseg(state: State, classes: Sequence[str] | None) -> dict[str, Any]:
    learned = f"{_PROMPT_LEARNER}prefix_prompt" in state or f"{_PROMPT_LEARNER}suffix_prompt" in state
    return _options(state, classes) | {
        "MODEL.TWO_STAGE.TEMPLATES": "{}." if learned else "ovseg_14",
        "MODEL.TWO_STAGE.CROP.THRESHOLD": 0.5 if learned else 0.4,
        "MODEL.TWO_STAGE.SCORES.FUSION": "zsseg",
        "MODEL.TWO_STAGE.SCORES.ALPHA": 0.2 if learned else 0.5,
        "MODEL.TWO_STAGE.SCORES.BETA": 0.8 if learned else 0.5,
    }


def _zegformer(state: State, classes: Sequence[str] | None) -> dict[str, Any]:
    return _options(state, classes) | {
        "MODEL.TWO_STAGE.TEMPLATES": "single_scene",
        "MODEL.TWO_STAGE.CROP_TEMPLATES": "zegformer_32",
        "MODEL.TWO_STAGE.NORMALIZE_NO_OBJECT": False,
        "MODEL.TWO_STAGE.CROP_SCALE": 0.0,
        "MODEL.TWO_STAGE.CROP.THRESHOLD": 0.0,
        "MODEL.TWO_STAGE.CROP.SAMPLING": "roi_align",
        "MODEL.TWO_STAGE.CROP.KEEP_EMPTY": True,
        "MODEL.TWO_STAGE.CROP.PADDED_LOGITS": True,
        "MODEL.TWO_STAGE.SCORES.FUSION": "zegformer",
        "MODEL.TWO_STAGE.SCORES.ALPHA": 1 / 3,
        "MODEL.TWO_STAGE.SCORES.BETA": 2 / 3,
        "MODEL.TWO_STAGE.SCORES.CLIP_BACKGROUND": True,
        "MODEL.TWO_STAGE.CALIBRATION": 0.1,
    }


def _layout(
    name: str,
    about: str,
    matches: Callable[[State], bool],
    options: Callable[[State, Sequence[str] | None], dict[str, Any]],
    *,
    licence: str = "",
    optional: str | None = None,
) -> ModelLayout:
    return register_layout(
        ModelLayout(
            name=name,
            about=about,
            matches=matches,
            classes="stuff_classes",
            convert=_convert,
            options=options,
            metadata=_metadata,
            prefixes=_prefixes,
            drops=_DROPS,
            licence=licence,
            optional=optional,
        )
    )


def _adapts_clip(state: State) -> bool:
    return f"{_ADAPTER}non_object_embedding" in state and f"{_PREDICTOR}class_embed.layers.0.weight" in state


def _is_zegformer(state: State) -> bool:
    return f"{_PREDICTOR}bg_feature" in state and f"{_PREDICTOR}projection_layer.weight" in state


OVSEG = _layout(
    "ovseg",
    f"OVSeg as Detectron2 saves it: {_ADAPTER}*, {_MASK_PROMPTS}",
    lambda state: _adapts_clip(state) and _MASK_PROMPTS in state,
    _ovseg,
    licence=NON_COMMERCIAL,
)
ZSSEG = _layout(
    "zsseg",
    f"zsseg as Detectron2 saves it: {_ADAPTER}*, no mask prompts",
    lambda state: _adapts_clip(state) and _MASK_PROMPTS not in state,
    _zsseg,
)
ZEGFORMER = _layout(
    "zegformer",
    f"ZegFormer as Detectron2 saves it: {_PREDICTOR}projection_layer.*, {_ZEGFORMER_CLIP}*",
    lambda state: _is_zegformer(state) and _clip_prefix(state) == _ZEGFORMER_CLIP,
    _zegformer,
    licence=NON_COMMERCIAL,
)
ZEGFORMER_PROPOSALS = _layout(
    "zegformer_proposals",
    f"ZegFormer as training saves it, without CLIP: {_PREDICTOR}projection_layer.*, no {_ZEGFORMER_CLIP}*",
    lambda state: _is_zegformer(state) and _clip_prefix(state) != _ZEGFORMER_CLIP,
    _zegformer,
    licence=NON_COMMERCIAL,
    optional=r"encoder\.clip\..*",
)
