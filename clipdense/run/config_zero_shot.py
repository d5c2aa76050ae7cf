"""The range or the choices of the keys below MODEL.ZERO_SHOT and MODEL.MASKCLIP_PLUS."""

from __future__ import annotations

from clipdense.clip.attention import MODES
from clipdense.clip.templates import get as template_set
from clipdense.run.config_checks import Check, choice, items, number, parsed, text, whole
from clipdense.systems.training_free.methods import METHODS
from clipdense.systems.training_free.names import NAME_LISTS

__all__ = ["ZERO_SHOT_CHECKS"]

_TEMPLATES = parsed(template_set, "a template set or a sentence with {} in it")

_ZERO_SHOT: dict[str, Check] = {
    "METHOD": choice(*METHODS),
    "WINDOW": whole(0),
    "STRIDE": whole(0),
    "PADDING": whole(-1),
    "BATCH_SIZE": whole(1),
    "TEMPLATES": _TEMPLATES,
    "CLASS_NAMES": choice("", *NAME_LISTS),
    "LOGIT_SCALE": number(0),
    "PROB_THRESHOLD": number(0, 1),
    "AREA_THRESHOLD": number(0, 1),
    "CLASS_THRESHOLD": number(0, 1),
    "PAMR_STEPS": whole(0),
    "PAMR_DILATIONS": items(whole(1), least=1),
    "PROMPT_DENOISING": number(0, 1),
    "KEY_SMOOTHING": number(0, 1),
    "KEY_NORM": choice("channels", "tokens"),
    "SAM.COARSE_THRESHOLD": number(0, 1),
    "SAM.MINIMAL_AREA": whole(0),
    "SAM.IOU_THRESHOLD": number(0, 1),
}

_MASKCLIP_PLUS: dict[str, Check] = {
    "SEGMENTOR": text(),
    "SETTING": choice("annotation_free", "zero_shot"),
    "UNSEEN": items(text()),
    "SELF_TRAINING_FROM": whole(0),
    "MIN_SCORE": number(),
    "DISTILLATION": number(0),
    "TEMPLATES": _TEMPLATES,
    "MODE": choice(*MODES),
    "PROMPT_DENOISING": number(0, 1),
    "KEY_SMOOTHING": number(0, 1),
    "KEY_NORM": choice("channels", "tokens"),
    "BACKGROUND": choice("text", "learned"),
    "OHEM.THRESHOLD": number(0, 1),
    "OHEM.MIN_KEPT": whole(0),
}

ZERO_SHOT_CHECKS: dict[str, Check] = {
    **{f"MODEL.ZERO_SHOT.{key}": check for key, check in _ZERO_SHOT.items()},
    **{f"MODEL.MASKCLIP_PLUS.{key}": check for key, check in _MASKCLIP_PLUS.items()},
}
"""Full name of a key -> the check of its value."""
