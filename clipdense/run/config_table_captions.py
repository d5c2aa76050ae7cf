"""The range or the choices of the config keys of systems that learn from images with captions."""

from __future__ import annotations

from typing import get_args

from clipdense.clip.attention import MODES
from clipdense.clip.templates import get as template_set
from clipdense.evaluation.patches import Grouping
from clipdense.run.config_checks import Check, choice, items, number, parsed, text, whole
from clipdense.systems.clippy.image import ImageSource, Pooling

__all__ = ["CAPTION_CHECKS"]

_POSITIVE, _COUNT, _SHARE = whole(1), whole(0), number(0, 1)
_AT_LEAST_0, _ABOVE_0 = number(0), number(above=0)
_MODES = [name for name, mode in MODES.items() if not mode.guidance]
_TEMPLATES = parsed(template_set, "a template set or a sentence with {} in it")
_RANGE = items(number(above=0), length=2)

CAPTION_CHECKS: dict[str, Check] = {
    "DATASETS.CAPTIONS": items(text()),
    "INPUT.CAPTION.SIZE": _POSITIVE,
    "INPUT.CAPTION.CROP_SCALE": _RANGE,
    "INPUT.CAPTION.NOUN_SHARE": _SHARE,
    "INPUT.CAPTION.NOUN_TEMPLATES": _TEMPLATES,
    "TEST.PATCHES.GROUPS": _COUNT,
    "TEST.PATCHES.GROUPING": choice(*get_args(Grouping)),
    "MODEL.PACL.INIT": choice("random", "projection"),
    "MODEL.PACL.MODE": choice(*_MODES),
    "MODEL.PACL.PATCH_TEMPERATURE": _ABOVE_0,
    "MODEL.PACL.LOGIT_SCALE": _AT_LEAST_0,
    "MODEL.PACL.MAX_LOGIT_SCALE": number(1),
    "MODEL.PACL.TEMPLATES": _TEMPLATES,
    "MODEL.PACL.WINDOW": _COUNT,
    "MODEL.PACL.STRIDE": _COUNT,
    "MODEL.PACL.BATCH_SIZE": _POSITIVE,
    "MODEL.CLIPPY.IMAGE": choice(*get_args(ImageSource)),
    "MODEL.CLIPPY.POOLING": choice(*get_args(Pooling)),
    "MODEL.CLIPPY.TOKEN_DROP": number(0, below=1),
    "MODEL.CLIPPY.LOGIT_SCALE": _AT_LEAST_0,
    "MODEL.CLIPPY.MAX_LOGIT_SCALE": number(1),
    "MODEL.CLIPPY.TEMPLATES": _TEMPLATES,
    "MODEL.CLIPPY.WINDOW": _COUNT,
    "MODEL.CLIPPY.STRIDE": _COUNT,
    "MODEL.CLIPPY.BATCH_SIZE": _POSITIVE,
    "MODEL.SEGCLIP.CENTERS": _POSITIVE,
    "MODEL.SEGCLIP.GROUP_LAYERS": _POSITIVE,
    "MODEL.SEGCLIP.CROSS_LAYERS": _COUNT,
    "MODEL.SEGCLIP.RECONSTRUCT_LAYERS": _COUNT,
    "MODEL.SEGCLIP.DECODER.WIDTH": _POSITIVE,
    "MODEL.SEGCLIP.DECODER.DEPTH": _COUNT,
    "MODEL.SEGCLIP.DECODER.HEADS": _POSITIVE,
    "MODEL.SEGCLIP.KEEP": number(above=0, below=1),
    "MODEL.SEGCLIP.RECONSTRUCTION_WEIGHT": _AT_LEAST_0,
    "MODEL.SEGCLIP.SUPERPIXEL_WEIGHT": _AT_LEAST_0,
    "MODEL.SEGCLIP.MAX_LOGIT_SCALE": number(1),
    "MODEL.SEGCLIP.TEMPLATES": _TEMPLATES,
    "MODEL.SEGCLIP.WINDOW": _POSITIVE,
    "MODEL.SEGCLIP.STRIDE": _POSITIVE,
    "MODEL.SEGCLIP.TOP_CLASSES": _COUNT,
    "INPUT.SEGCLIP.SIZE": _POSITIVE,
    "INPUT.SEGCLIP.PATCH": _POSITIVE,
    "INPUT.SEGCLIP.CROP_SCALE": _RANGE,
    "INPUT.SEGCLIP.SUPERPIXELS": items(_AT_LEAST_0, length=3),
    "INPUT.SEGCLIP.PATCH_LABEL": choice("majority", "mean"),
}
"""Full name of a key -> the check of its value."""
