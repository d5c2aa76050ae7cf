"""Checks of a whole config before anything is built: values, keys that must fit together, paths."""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from functools import cache
from pathlib import Path
from typing import Any

import open_clip

from clipdense.clip.nano import NANO_MODELS
from clipdense.engine.options import ConfigError
from clipdense.engine.run_config import RunConfig
from clipdense.run.config import add_clipdense_config
from clipdense.run.config_checks import check_values, item_of, matches_type, shown
from clipdense.run.config_table import CHECKS
from clipdense.run.keys import config_keys, config_value

from detectron2.config import CfgNode, get_cfg

__all__ = ["PATH_KEYS", "check_config", "check_files", "config_remarks", "expand_paths", "expanded"]

# Keys whose value is a path, or may be one instead of a name.
PATH_KEYS = (
    "OUTPUT_DIR",
    "MODEL.WEIGHTS",
    "MODEL.CLIP.NAME",
    "MODEL.CLIP.PRETRAINED",
    "MODEL.TIMM.PRETRAINED",
    "MODEL.PROMPT.WEIGHTS",
    "MODEL.CONTRASTIVE_CLIP.LOCKED_TEXT",
    "MODEL.CLIPSELF.CONCEPTS",
    "MODEL.FVLM.TEXT_TABLE",
    "MODEL.FVLM.TEXT_ENCODER.NAME",
    "MODEL.FVLM.TEXT_ENCODER.PRETRAINED",
    "MODEL.TEXT_RCNN.TABLE",
    "INPUT.CAPTIONS",
    "MODEL.MASK_FORMER.TEST.MASK_SOURCE",
    "MODEL.MASK_POOLING.OUT_OF_VOCABULARY.NAME",
    "MODEL.MASK_POOLING.OUT_OF_VOCABULARY.PRETRAINED",
    "MODEL.TWO_STAGE.ADAPTED_CLIP",
    "MODEL.TWO_STAGE.CROP_CLIP.NAME",
    "MODEL.TWO_STAGE.CROP_CLIP.PRETRAINED",
    "TEST.DENSE_REGIONS.TABLE",
    "DATASETS.PROPOSAL_FILES_TRAIN",
    "DATASETS.PROPOSAL_FILES_TEST",
)
_WEIGHT_SUFFIXES = (".bin", ".npy", ".pt", ".pth", ".safetensors")
# Keys with the name of a CLIP.
_CLIP_NAMES = (
    "MODEL.CLIP.NAME",
    "MODEL.FVLM.TEXT_ENCODER.NAME",
    "MODEL.MASK_POOLING.OUT_OF_VOCABULARY.NAME",
    "MODEL.TWO_STAGE.CROP_CLIP.NAME",
)
# Meta-architectures without a place for learned contexts.
_WITHOUT_PROMPTS = (
    "CATSeg",
    "SED",
    "SegCLIP",
    "CLIPpy",
    "MaskAdaptedCLIP",
    "ContrastiveCLIP",
    "CLIPSelf",
    "RegionCLIPBaseline",
)
# Start of a key -> the key that it depends on, and the values of that key with which it has an effect.
_DEPENDS_ON: dict[str, tuple[str, tuple[Any, ...]]] = {
    "SOLVER.AMP.DTYPE": ("SOLVER.AMP.ENABLED", (True,)),
    "SOLVER.CLIP_GRADIENTS.CLIP_": ("SOLVER.CLIP_GRADIENTS.ENABLED", (True,)),
    "SOLVER.BETAS": ("SOLVER.OPTIMIZER", ("AdamW",)),
    "SOLVER.EPS": ("SOLVER.OPTIMIZER", ("AdamW",)),
    "SOLVER.MOMENTUM": ("SOLVER.OPTIMIZER", ("SGD",)),
    "SOLVER.NESTEROV": ("SOLVER.OPTIMIZER", ("SGD",)),
    "SOLVER.POLY_LR_POWER": ("SOLVER.LR_SCHEDULER_NAME", ("WarmupPolyLR",)),
    "SOLVER.BASE_LR_END": ("SOLVER.LR_SCHEDULER_NAME", ("WarmupCosineLR", "WarmupPolyLR")),
    "DATALOADER.REPEAT_THRESHOLD": ("DATALOADER.SAMPLER_TRAIN", ("RepeatFactorTrainingSampler",)),
    "INPUT.CROP.TYPE": ("INPUT.CROP.ENABLED", (True,)),
    "INPUT.CROP.SIZE": ("INPUT.CROP.ENABLED", (True,)),
    "INPUT.SCALE_JITTER.": ("INPUT.SCALE_JITTER.ENABLED", (True,)),
    "INPUT.CLIPSELF.JITTER": ("INPUT.CLIPSELF.REGIONS", ("patches", "proposals")),
    "INPUT.CLIPSELF.": ("INPUT.MAPPER", ("CLIPSelfMapper",)),
    "MODEL.CLIPSELF.": ("MODEL.META_ARCHITECTURE", ("CLIPSelf", "RegionCLIPBaseline")),
    "MODEL.MASK_ADAPTED_CLIP.": ("MODEL.META_ARCHITECTURE", ("MaskAdaptedCLIP",)),
    "MODEL.CONTRASTIVE_CLIP.": ("MODEL.META_ARCHITECTURE", ("ContrastiveCLIP",)),
    "MODEL.SEGCLIP.": ("MODEL.META_ARCHITECTURE", ("SegCLIP",)),
    "INPUT.SEGCLIP.": ("INPUT.MAPPER", ("SegCLIPMapper",)),
    "MODEL.PACL.": ("MODEL.META_ARCHITECTURE", ("PACL",)),
    "MODEL.CLIPPY.": ("MODEL.META_ARCHITECTURE", ("CLIPpy",)),
    "INPUT.CAPTION.": ("INPUT.MAPPER", ("CaptionMapper",)),
    "MODEL.PROMPTED_CLIP.": ("MODEL.META_ARCHITECTURE", ("PromptedCLIP",)),
    "INPUT.OBJECT_CROP.": ("INPUT.MAPPER", ("ObjectCropMapper",)),
    "MODEL.TEXT_RCNN.": ("MODEL.ROI_HEADS.NAME", ("TextROIHeads",)),
    "MODEL.PROMPT.INSTANCE_TOKENS": ("MODEL.PROMPT.METHOD", ("icpc",)),
    "MODEL.PROMPT.CONTEXT_WORDS": ("MODEL.PROMPT.METHOD", ("contexts", "cocoop", "icpc")),
    "MODEL.PROMPT.PRE_MODEL.": ("MODEL.PROMPT.METHOD", ("pre_model",)),
    "MODEL.LANGUAGE.N_CONTEXTS": ("MODEL.PROMPT.METHOD", ("",)),
    "MODEL.LANGUAGE.CONTEXT_STD": ("MODEL.PROMPT.METHOD", ("",)),
    "MODEL.LANGUAGE.CONTEXT_WORDS": ("MODEL.PROMPT.METHOD", ("",)),
    "MODEL.PIXEL_TEXT.LOSS": ("MODEL.PIXEL_TEXT.SOURCE", ("boxes", "masks")),
    "MODEL.LANGUAGE.TABLE_DIM": ("MODEL.LANGUAGE.TEXT", ("table",)),
    "MODEL.FVLM.TEXT_TABLE": ("MODEL.FVLM.TEXT_SOURCE", ("table",)),
    "INPUT.CAPTIONS": ("INPUT.MAPPER", ("CaptionedSegmentationMapper",)),
    "MODEL.MASK_POOLING.": ("MODEL.META_ARCHITECTURE", ("FCCLIP",)),
    "MODEL.MASK_POOLING.GROUNDING.": ("MODEL.MASK_POOLING.GROUNDING.ENABLED", (True,)),
    "MODEL.MASK_FORMER.TEST.MASK_SOURCE": ("MODEL.META_ARCHITECTURE", ("FCCLIP", "OVSeg")),
}


def check_config(cfg: CfgNode) -> None:
    """Check every value of a config.

    Args:
        cfg: yacs config with the keys of Detectron2 and clipdense, and possibly others.

    Raises:
        ConfigError: If a value has the wrong type, lies outside its range, is not one of its choices, or does
            not fit another value. Names the key, the value and what is expected.
    """
    values = {}
    for key, default in _defaults().items():
        value = config_value(cfg, key, _Missing)
        if value is _Missing:
            _check_parents(cfg, key)
            continue
        values[key] = value
        if key not in CHECKS:
            check_values(values, {key: matches_type(default)})
    check_values(values, CHECKS)
    _check_together(cfg)


def config_remarks(cfg: CfgNode, explicit: Collection[str] = ()) -> list[str]:
    """List what in a valid config has no effect or is probably a mistake.

    Args:
        cfg: a config that `check_config` accepts.
        explicit: keys that the user has set; only these are said to have no effect.
    """
    remarks = []
    s = cfg.SOLVER
    beyond = [step for step in s.STEPS if step >= s.MAX_ITER]
    if "SOLVER.STEPS" in explicit and beyond and s.LR_SCHEDULER_NAME == "WarmupMultiStepLR":
        remarks.append(f"SOLVER.STEPS {beyond} have no effect: SOLVER.MAX_ITER is {s.MAX_ITER}")
    if cfg.TEST.BEST_METRIC and not cfg.DATASETS.TEST:
        remarks.append("TEST.BEST_METRIC has no effect: DATASETS.TEST is empty")
    for key in sorted(explicit):
        if key not in _defaults() or _equal(config_value(cfg, key), _defaults()[key]):
            continue
        for start, (other, effective) in _DEPENDS_ON.items():
            if key.startswith(start) and key != other and config_value(cfg, other) not in effective:
                remarks.append(
                    f"{key} has no effect: {other} is {shown(config_value(cfg, other))}, not "
                    f"{' or '.join(map(shown, effective))}"
                )
    return remarks


def expand_paths(cfg: CfgNode) -> None:
    """Expand ``~`` and environment variables in every path of a config (in place).

    Raises:
        ConfigError: If a path names a variable that is not set.
    """
    for key in PATH_KEYS:
        value = config_value(cfg, key)
        new: Any = value
        if isinstance(value, str):
            new = expanded(value, key)
        elif isinstance(value, list | tuple):
            new = type(value)(expanded(v, key) if isinstance(v, str) else v for v in value)
        if new != value:
            *parents, last = key.split(".")
            node = config_value(cfg, ".".join(parents)) if parents else cfg
            node[last] = new


def expanded(path: str, key: str) -> str:
    """Expand ``~`` and environment variables in a path.

    Args:
        path: the path; text without ``~`` at the start and without ``$`` is returned unchanged.
        key: name of the setting, for the error.

    Raises:
        ConfigError: If the path names a variable that is not set.
    """
    new = os.path.expanduser(os.path.expandvars(path))
    if unset := re.search(r"\$(\w+|\{\w+\})", new):
        raise ConfigError(f"{key} is {path!r}, but the environment variable {unset[0]} is not set")
    return new


def check_files(run: RunConfig, checkpoint_exists: bool) -> None:
    """Check that the files which a config names exist, before any data or weights are read or downloaded.

    Args:
        run: settings of the run.
        checkpoint_exists: whether a checkpoint in the output folder replaces the weights.

    Raises:
        ConfigError: If a file does not exist. Names the key.
    """
    if not checkpoint_exists and _missing(run.weights):
        raise ConfigError(f"{run.weights_key}: weight file {run.weights} does not exist")
    cfg = run.cfg
    if not isinstance(cfg, CfgNode):
        return
    for key in PATH_KEYS[2:]:
        value = config_value(cfg, key)
        is_path = isinstance(value, str) and (os.sep in value or Path(value).suffix in _WEIGHT_SUFFIXES)
        below_data = Path(os.environ.get("DETECTRON2_DATASETS", "datasets"), str(value))
        if is_path and _looks_local(value) and not Path(value).exists() and not below_data.exists():
            raise ConfigError(f"{key}: file {value} does not exist")


class _Missing:
    """Marks keys that a config lacks."""


@cache
def _defaults() -> dict[str, Any]:
    cfg = get_cfg()
    add_clipdense_config(cfg)
    return {key: config_value(cfg, key) for key in config_keys(cfg)}


def _check_parents(cfg: CfgNode, key: str) -> None:
    """Check that no value stands in place of a group of keys."""
    parts = key.split(".")
    for i in range(1, len(parts)):
        node = config_value(cfg, ".".join(parts[:i]), _Missing)
        if node is not _Missing and not isinstance(node, CfgNode):
            raise ConfigError(f"{'.'.join(parts[:i])} is {shown(node)}; expected a group of keys")


def _check_together(cfg: CfgNode) -> None:
    channels = 1 if cfg.INPUT.FORMAT == "L" else 3
    for key in ("PIXEL_MEAN", "PIXEL_STD"):
        if len(cfg.MODEL[key]) != channels:
            raise ConfigError(
                f"MODEL.{key} is {shown(cfg.MODEL[key])}; expected {channels} numbers, one for each channel "
                f"of INPUT.FORMAT {cfg.INPUT.FORMAT}"
            )
    sizes = cfg.INPUT.MIN_SIZE_TRAIN
    num_sizes = len(sizes) if isinstance(sizes, list | tuple) else 1
    if cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING == "range" and num_sizes != 2:
        raise ConfigError(
            f"INPUT.MIN_SIZE_TRAIN is {shown(sizes)}; expected the smallest and the largest size, because "
            "INPUT.MIN_SIZE_TRAIN_SAMPLING is range"
        )
    if list(cfg.SOLVER.STEPS) != sorted(set(cfg.SOLVER.STEPS)):
        raise ConfigError(f"SOLVER.STEPS is {shown(cfg.SOLVER.STEPS)}; expected ascending iterations")
    for key in ("METHOD", "WEIGHTS"):
        if cfg.MODEL.PROMPT[key] and cfg.MODEL.META_ARCHITECTURE in _WITHOUT_PROMPTS:
            raise ConfigError(
                f"MODEL.PROMPT.{key} is {shown(cfg.MODEL.PROMPT[key])}, but {cfg.MODEL.META_ARCHITECTURE} "
                "takes no learned prompts; leave it empty"
            )
    if not cfg.MODEL.CLIP.CONFIG:
        names = {key: config_value(cfg, key) for key in _CLIP_NAMES}
        check_values(names, dict.fromkeys(_CLIP_NAMES, _clip_name))


def _clip_name(value: Any) -> str | None:
    """Check the name of a CLIP: one of open_clip or of this package, a hub id, a file, or ""."""
    known = [*NANO_MODELS, *open_clip.list_models()]
    if not isinstance(value, str):
        return "the name of a CLIP model or a weight file"
    if (
        not value
        or value in known
        or value.replace("/", "-") in known
        or "/" in value
        or os.path.exists(value)
    ):
        return None
    if ":" in value or Path(value).suffix in _WEIGHT_SUFFIXES:
        return None  # a hub id or a file; loading says what is wrong with it
    return item_of(lambda: known)(value)


def _looks_local(value: str) -> bool:
    """Return whether a path begins like one, and not like a hub id or URL (``organisation/name``)."""
    return "://" not in value and value.startswith((os.sep, ".", "~")) or bool(Path(value).suffix)


def _missing(path: Any) -> bool:
    return isinstance(path, str) and bool(path) and "://" not in path and not os.path.isfile(path)


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return list(a) == list(b)
    return bool(a == b)
