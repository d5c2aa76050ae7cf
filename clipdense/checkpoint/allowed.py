"""Config keys that a weight file may set: those that describe how the model is built, and no others.

A weight file comes from somewhere else. Its metadata must not name files, downloads or folders, and must not
switch on anything that runs code. `config_options` checks every file against this list.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

__all__ = ["ALLOWED_KEYS", "allowed_options", "check_options", "is_plain_name"]

ALLOWED_KEYS = (
    "INPUT.FORMAT",
    "TEST.DETECTIONS_PER_IMAGE",
    "MODEL.META_ARCHITECTURE",
    "MODEL.MASK_ON",
    "MODEL.PIXEL_MEAN",
    "MODEL.PIXEL_STD",
    "MODEL.BACKBONE.NAME",
    "MODEL.BACKBONE.FREEZE_AT",
    "MODEL.FPN.*",
    "MODEL.ANCHOR_GENERATOR.*",
    "MODEL.PROPOSAL_GENERATOR.*",
    "MODEL.RPN.*",
    "MODEL.RETINANET.*",
    "MODEL.ROI_HEADS.*",
    "MODEL.ROI_BOX_HEAD.*",
    "MODEL.ROI_MASK_HEAD.*",
    "MODEL.RESNETS.*",
    "MODEL.SEM_SEG_HEAD.*",
    "MODEL.CLIP.NAME",
    "MODEL.CLIP.PRETRAINED",
    "MODEL.CLIP.POSITION_RULE",
    "MODEL.CLIP.POSITION_GRID",
    "MODEL.CLIP.DOUBLE_CLASS_EMBEDDING",
    "MODEL.CLIP.CONFIG.embed_dim",
    "MODEL.CLIP.CONFIG.custom_text",
    "MODEL.CLIP.CONFIG.quick_gelu",
    "MODEL.CLIP.CONFIG.vision_cfg.*",
    "MODEL.CLIP.CONFIG.text_cfg.*",
    "MODEL.TIMM.NAME",
    "MODEL.TIMM.PRETRAINED",
    "MODEL.TIMM.KWARGS.embed_dim",
    "MODEL.TIMM.KWARGS.depths",
    "MODEL.TIMM.KWARGS.num_heads",
    "MODEL.TIMM.KWARGS.window_size",
    "MODEL.TRUNK.*",
    "MODEL.FROZEN_CLIP.*",
    "MODEL.INTERPOLATED.*",
    "MODEL.SEGCLIP.CENTERS",
    "MODEL.SEGCLIP.GROUP_LAYERS",
    "MODEL.SEGCLIP.CROSS_LAYERS",
    "MODEL.SEGCLIP.RECONSTRUCT_LAYERS",
    "MODEL.SEGCLIP.DECODER.*",
    "MODEL.LANGUAGE.TRUNK",
    "MODEL.LANGUAGE.BESIDE",
    "MODEL.LANGUAGE.TEXT",
    "MODEL.LANGUAGE.TABLE_DIM",
    "MODEL.LANGUAGE.CLASSES",
    "MODEL.LANGUAGE.CLASSES_FROM",
    "MODEL.LANGUAGE.FREEZE_TEXT",
    "MODEL.LANGUAGE.N_CONTEXTS",
    "MODEL.LANGUAGE.CONTEXT_DECODER.*",
    "MODEL.LANGUAGE.TAU",
    "MODEL.LANGUAGE.SCORE",
    "MODEL.LANGUAGE.LAST_MAP",
    "MODEL.SEMANTIC_SEGMENTOR.*",
    "MODEL.PIXEL_TEXT.SOURCE",
    "MODEL.PIXEL_TEXT.WEIGHT",
    "MODEL.MASK_FORMER.*",
    "MODEL.CAT_SEG.*",
    "MODEL.MASK_POOLING.TEMPLATES",
    "MODEL.MASK_POOLING.EMBED_LAYERS",
    "MODEL.MASK_POOLING.EMBED_NORM",
    "MODEL.MASK_POOLING.TEXT_PROJECTION",
    "MODEL.MASK_POOLING.ENSEMBLE.*",
    "MODEL.FVLM.TEXT_SOURCE",
    "MODEL.FVLM.BACKGROUND",
    "MODEL.FVLM.EMBEDDING_RELU",
    "MODEL.FVLM.BOX_FC_DIM",
    "MODEL.FVLM.SCALE",
    "MODEL.FVLM.LEARN_SCALE",
    "MODEL.FVLM.FINEST_BOX_SIZE",
    "MODEL.FVLM.FUSION",
    "MODEL.FVLM.ALPHA",
    "MODEL.FVLM.BETA",
    "MODEL.FVLM.CLIP_SCALE",
    "MODEL.FVLM.SQUARE_SIZE",
    "MODEL.TWO_STAGE.EMBED_LAYERS",
    "MODEL.TWO_STAGE.EMBED_HIDDEN_DIM",
    "MODEL.TWO_STAGE.MASK_PROMPTS.*",
    "MODEL.TWO_STAGE.PROMPT_CONTEXT",
    "MODEL.TWO_STAGE.TEMPLATES",
    "MODEL.TWO_STAGE.CROP_TEMPLATES",
    "MODEL.TWO_STAGE.NORMALIZE_NO_OBJECT",
    "MODEL.TWO_STAGE.CROP_SCALE",
    "MODEL.TWO_STAGE.CROP.*",
    "MODEL.TWO_STAGE.SCORES.*",
    "MODEL.TWO_STAGE.CALIBRATION",
)
"""Full names of config keys; ``*`` stands for any key below the node."""

_FREE_TEXT = (
    "MODEL.LANGUAGE.CLASSES",
    "MODEL.TWO_STAGE.TEMPLATES",
    "MODEL.TWO_STAGE.CROP_TEMPLATES",
    "MODEL.MASK_POOLING.TEMPLATES",
)
_WEIGHTS = "MODEL.*PRETRAINED"
_FILE = re.compile(r".*\.(pt|pth|bin|pkl|pyth|ckpt|safetensors|npz?|json|ya?ml|txt|csv|py)", re.IGNORECASE)
_MAX_NUMBER = 1_000_000


def check_options(options: Mapping[str, Any], source: str) -> None:
    """Check the config keys that the metadata of a weight file sets.

    Args:
        options: full config key -> value.
        source: the file, for the message.

    Raises:
        ValueError: If a key is not in `ALLOWED_KEYS`, a text is a path, a URL or a hub id, PRETRAINED is
            neither "random" nor "", or a number is out of range. The message names file and key.
    """
    for key, value in options.items():
        if not any(fnmatchcase(key, pattern) for pattern in ALLOWED_KEYS):
            raise ValueError(
                f"{source}: its metadata sets {key}, which a weight file may not set (only keys that "
                "describe how the model is built). If you trust the file, set the key on the command line"
            )
        if fnmatchcase(key, _WEIGHTS) and value not in ("", "random"):
            raise ValueError(
                f"{source}: its metadata sets {key} to {str(value)[:80]!r}; a weight file may only set "
                '"random" or "". If you trust the file, set the key on the command line'
            )
        if key not in _FREE_TEXT:
            _check_value(value, key, source)


def allowed_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of the options that a weight file may set, see `check_options`."""
    allowed = {}
    for key, value in options.items():
        try:
            check_options({key: value}, "")
        except ValueError:
            continue
        allowed[key] = value
    return allowed


def is_plain_name(text: str) -> bool:
    """Whether a text is a name: not a path, a file name, a URL or a hub id."""
    return not (re.search(r"[/\\:~$]|\.\.", text) or _FILE.fullmatch(text))


def _check_value(value: Any, key: str, source: str) -> None:
    if isinstance(value, list | tuple):
        for entry in value:
            _check_value(entry, key, source)
    elif isinstance(value, str) and not is_plain_name(value):
        raise ValueError(
            f"{source}: its metadata sets {key} to {value[:80]!r}; expected a name, not a path, a URL or a "
            "hub id"
        )
    elif isinstance(value, int | float) and not abs(value) <= _MAX_NUMBER:
        raise ValueError(f"{source}: its metadata sets {key} to {value}; expected at most {_MAX_NUMBER}")
    elif not isinstance(value, str | int | float | None):
        raise ValueError(
            f"{source}: its metadata sets {key} to a {type(value).__name__}; expected a plain value"
        )
