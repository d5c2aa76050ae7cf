"""The range or the choices of the config keys of mask pooling (FC-CLIP, ODISE)."""

from __future__ import annotations

from typing import get_args

from clipdense.clip.templates import get as template_set
from clipdense.run.config_checks import Check, choice, number, parsed, whole
from clipdense.systems.mask_pooling.ensemble import EmptyMasks, EnsembleSource, Rule
from clipdense.systems.mask_pooling.pooling import MaskPolicy
from clipdense.systems.mask_pooling.region_heads import RegionHead

__all__ = ["MASK_POOLING_CHECKS"]

_POSITIVE, _COUNT, _SHARE, _AT_LEAST_0 = whole(1), whole(0), number(0, 1), number(0)
_TEMPLATES = parsed(template_set, "a template set or a sentence with {} in it")

MASK_POOLING_CHECKS: dict[str, Check] = {
    "MODEL.MASK_POOLING.TEMPLATES": _TEMPLATES,
    "MODEL.MASK_POOLING.EMBED_LAYERS": _POSITIVE,
    "MODEL.MASK_POOLING.TEXT_PROJECTION": _COUNT,
    "MODEL.MASK_POOLING.VOID_INIT": choice("random", "text"),
    "MODEL.MASK_POOLING.OUT_OF_VOCABULARY.HEAD": choice(*get_args(RegionHead)),
    "MODEL.MASK_POOLING.OUT_OF_VOCABULARY.MASKS": choice(*get_args(MaskPolicy)),
    "MODEL.MASK_POOLING.OUT_OF_VOCABULARY.LOSS_WEIGHT": _AT_LEAST_0,
    "MODEL.MASK_POOLING.ENSEMBLE.ALPHA": _SHARE,
    "MODEL.MASK_POOLING.ENSEMBLE.BETA": _SHARE,
    "MODEL.MASK_POOLING.ENSEMBLE.RULE": choice(*get_args(Rule)),
    "MODEL.MASK_POOLING.ENSEMBLE.SOURCE": choice(*get_args(EnsembleSource)),
    "MODEL.MASK_POOLING.ENSEMBLE.EMPTY": choice(*get_args(EmptyMasks)),
    "MODEL.MASK_POOLING.ENSEMBLE.VOID_ADJUSTMENT": _SHARE,
    "MODEL.MASK_POOLING.GROUNDING.WEIGHT": _AT_LEAST_0,
    "MODEL.MASK_POOLING.GROUNDING.NUM_PHRASES": _POSITIVE,
    "MODEL.MASK_POOLING.GROUNDING.TEMPLATE": _TEMPLATES,
}
"""Full name of a key -> the check of its value."""
