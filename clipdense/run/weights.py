"""Weight files that say what they need: config keys of MODEL.WEIGHTS, and published files converted."""

import difflib
import logging
import math
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from clipdense.checkpoint import (
    Checkpoint,
    CheckpointError,
    DropRule,
    Layout,
    Report,
    account,
    class_differences,
    config_options,
    convert_model,
    detect_layout,
    model_layout,
    read_checkpoint,
    rename,
    save_checkpoint,
)
from clipdense.clip import load_clip
from clipdense.clip.layouts import MASK_PROMPTS
from clipdense.data.classes import class_names
from clipdense.data.heads import head_classes
from clipdense.engine.options import ConfigError
from clipdense.run.config import add_clipdense_config

from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model

__all__ = [
    "Conversion",
    "account_model",
    "apply_weight_options",
    "check_weight_classes",
    "config_keys",
    "convert_weights",
    "print_weight_options",
    "set_options",
]

logger = logging.getLogger(__name__)

# Where parts of a model start, and whether there is a text tower: a file that holds the whole model decides
# it, whatever a config says (such as the one that a run leaves, which says everything).
_DECIDED_BY_FILE = (
    "MODEL.CLIP.PRETRAINED",
    "MODEL.TIMM.PRETRAINED",
    "MODEL.LANGUAGE.TEXT",
    "MODEL.LANGUAGE.TABLE_DIM",
)


def apply_weight_options(cfg: CfgNode, explicit: Collection[str]) -> None:
    """Set the config keys that the weights in ``MODEL.WEIGHTS`` need (in place).

    Published files of a known layout need theirs, files that `convert_weights` wrote or that a model exported
    bring them; others need none. What the command line or the config file says stays, and a conflict is
    printed.

    Args:
        explicit: keys that the command line or the config file sets.

    Raises:
        CheckpointError: the file cannot be read, or its tensors determine no model.
        ConfigError: it needs a key that does not exist.
    """
    weights: str = cfg.MODEL.WEIGHTS
    file = _read(weights, cfg.MODEL.ALLOW_PICKLE)
    for key, value in ({} if file is None else config_options(file)).items():
        if key not in explicit or key in _DECIDED_BY_FILE:
            _set(cfg, key, value, weights)
        elif (chosen := _get(cfg, key)) not in ([], ()) and not _same(chosen, value):  # empty: left open
            logger.warning("%s stays %s as the config says, but %s needs %s", key, chosen, weights, value)


def print_weight_options(weights: str, allow_pickle: bool = False) -> None:
    """Print what weights need, for a LazyConfig, whose objects no config key reaches."""
    file = _read(weights, allow_pickle)
    if options := {} if file is None else config_options(file):
        lines = "\n".join(f"  {key}: {value}" for key, value in options.items())
        logger.warning("%s needs what a yacs config would say as\n%s", weights, lines)


def check_weight_classes(cfg: CfgNode) -> None:
    """Check that the data sets have the classes that the weights in ``MODEL.WEIGHTS`` were trained for.

    Another list in ``MODEL.LANGUAGE.CLASSES`` is taken at its word.

    Raises:
        ConfigError: they have not; with the list.
    """
    file = _read(cfg.MODEL.WEIGHTS, cfg.MODEL.ALLOW_PICKLE)
    listed = None if file is None else file.metadata.get("options", {}).get("classes")
    if list(cfg.MODEL.LANGUAGE.CLASSES) != listed or not (cfg.DATASETS.TRAIN or cfg.DATASETS.TEST):
        return
    if differences := class_differences(listed, class_names(cfg, cfg.MODEL.LANGUAGE.CLASSES_FROM)):
        raise ConfigError(
            f"MODEL.WEIGHTS {cfg.MODEL.WEIGHTS} was trained for other classes than the data sets':\n  "
            + "\n  ".join(differences)
            + "\nTo train it on these, set MODEL.LANGUAGE.CLASSES to their names, and name the parameters "
            "that depend on them in MODEL.WEIGHTS_SKIP."
        )


def set_options(cfg: CfgNode, options: Mapping[str, Any], source: str) -> None:
    """Set config keys by their full names (in place); lists become what the config has, and ints floats.

    Raises:
        ConfigError: a key that does not exist, or a value of another type; names ``source``.
    """
    for key, value in options.items():
        _set(cfg, key, value, source)


def config_keys(cfg: CfgNode, prefix: str = "") -> Iterator[str]:
    """The full names of all keys."""
    for key, value in cfg.items():
        if isinstance(value, CfgNode):
            yield from config_keys(value, f"{prefix}{key}.")
        else:
            yield prefix + key


@dataclass(frozen=True)
class Conversion:
    """What `convert_weights` did.

    Attributes:
        layout: of the file that was read.
        kept: how many tensors were written.
        dropped: keys that were left out, by the name of the rule.
        options: config key -> value, as written.
        classes: their names; None where they are not known.
        licence: of the published weights; "" where it allows every use.
    """

    layout: str
    kept: int
    dropped: dict[str, list[str]]
    options: dict[str, Any]
    classes: list[str] | None
    licence: str = ""


def convert_weights(
    source: str | Path,
    target: str | Path,
    *,
    classes: Sequence[str] | None = None,
    options: Mapping[str, Any] | None = None,
    allow_pickle: bool = False,
) -> Conversion:
    """Convert a published model's file to safetensors with our keys and the options that its weights need.

    The file of a CLIP becomes one that `load_clip` loads without being told the model.

    Args:
        classes: names that the file must list, or that are noted where it lists none.
        options: config keys, and values other than the released models'; of a CLIP, MODEL.CLIP.NAME alone.
        allow_pickle: see `read_checkpoint`.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: it is unreadable, of no known layout, lists other classes, or lacks tensors, has
            more, or has some of another shape than a model of its sizes; with the full list. Nothing is
            written.
        ConfigError: an option that does not exist, or classes of a CLIP.
    """
    read = read_checkpoint(source, allow_pickle=allow_pickle)
    layout = model_layout(read.state)
    if layout is None:
        known = detect_layout(read.state, str(source))  # raises, naming the layouts
        if classes or set(options or {}) - {"MODEL.CLIP.NAME"}:
            raise ConfigError(f"{source} is a CLIP: it takes no classes, and no option but MODEL.CLIP.NAME")
        return _convert_clip(read, known, target, (options or {}).get("MODEL.CLIP.NAME", ""), allow_pickle)
    file = convert_model(read, classes)
    cfg = get_cfg()
    add_clipdense_config(cfg)
    needed = {**config_options(file), **(options or {})}
    set_options(cfg, needed, str(source))
    metadata = {**file.metadata, "options": {**file.metadata["options"], "config": needed}}
    report = account_model(cfg, file, drops=layout.drops, optional=layout.optional)
    if not report.complete:
        theirs = {ours: prefix for prefix, ours in layout.prefixes(read.state).items()}
        raise CheckpointError(
            f"{source}, of layout {layout.name}, does not fit a model of its sizes; nothing is written:\n  "
            + "\n  ".join(_problems(report, theirs))
        )
    dropped = {key for keys in report.dropped.values() for key in keys}
    state = {key: value for key, value in file.state.items() if key not in dropped}
    save_checkpoint(target, state, metadata)
    rules = {**report.dropped, **({"not part of the model": sorted(read.extras)} if read.extras else {})}
    names = metadata["options"].get("classes")
    return Conversion(layout.name, len(state), rules, needed, names, layout.licence)


def _convert_clip(
    read: Checkpoint, layout: Layout, target: str | Path, name: str, allow_pickle: bool
) -> Conversion:
    try:
        clip = load_clip(name or read.path, read.path if name else None, allow_pickle=allow_pickle)
    except ValueError as e:
        raise CheckpointError(f"{e} (--option MODEL.CLIP.NAME=...)") from e
    prompts = {key: value for key, value in read.state.items() if key == MASK_PROMPTS}
    save_checkpoint(target, {**clip.state_dict(), **prompts}, clip.file_metadata())
    report = account({**clip.state_dict(), **prompts}, layout.convert(read.state), drops=layout.drops)
    rules = {**report.dropped, **({"not part of the model": sorted(read.extras)} if read.extras else {})}
    return Conversion(layout.name, len(report.loaded), rules, {}, None)


def account_model(
    cfg: CfgNode, file: Checkpoint, drops: Sequence[DropRule] = (), optional: str | None = None
) -> Report:
    """Compare a file with the model that a config describes, which is built on the meta device.

    Args:
        drops: rules for keys of the file that are left out.
        optional: pattern of keys that it may lack.

    Raises:
        CheckpointError: no model can be built.
    """
    cfg = cfg.clone()
    cfg.MODEL.DEVICE = "meta"
    if not (cfg.MODEL.CLIP.PRETRAINED or os.path.isfile(cfg.MODEL.CLIP.NAME)):
        cfg.MODEL.CLIP.PRETRAINED = "random"  # only sizes matter
    if not cfg.MODEL.LANGUAGE.CLASSES and head_classes(cfg):  # the names are not known, and do not matter
        counted = head_classes(cfg)[0].key
        cfg.MODEL.LANGUAGE.CLASSES = [str(i) for i in range(_get(cfg, counted))]
    try:
        with torch.device("meta"):
            model = build_model(cfg)
    except (ValueError, AssertionError) as e:  # torch asserts that heads divide widths
        raise CheckpointError(f"{file.path}: no model can be built for it ({e})") from e
    return account(model.state_dict(), file.state, drops=drops, optional=optional)


def _read(path: str, allow_pickle: bool) -> Checkpoint | None:
    """The weight file under our keys; None for what is no file of tensors (a URL, a model zoo's pickle)."""
    if not os.path.isfile(path) or path.endswith((".pkl", ".pyth")):
        return None
    return convert_model(read_checkpoint(path, allow_pickle=allow_pickle, lazy=True))


def _problems(report: Report, theirs: Mapping[str, str]) -> list[str]:
    """One line a key, under the name that it has in the published file."""
    lines = [f"lacks {rename(key, theirs)}" for key in report.missing]
    lines += [f"has {rename(key, theirs)}, which is unknown" for key in report.unexpected]
    return lines + [
        f"has {rename(key, theirs)} {tuple(file)}, not {tuple(model)}"
        for key, (file, model) in report.mismatched.items()
    ]


def _get(cfg: CfgNode, key: str) -> Any:
    node: Any = cfg
    for part in key.split("."):
        node = node[part]
    return node


def _set(cfg: CfgNode, key: str, value: Any, source: str) -> None:
    """Set a key that exists, or one below a node that takes new keys; types as yacs converts them."""
    *parents, last = key.split(".")
    node, takes_new = cfg, False
    for part in parents:
        if takes_new and part not in node:
            node[part] = CfgNode()
        if not isinstance(node.get(part), CfgNode):
            raise _unknown(cfg, key, source)
        node = node[part]
        takes_new |= node.is_new_allowed()
    if last not in node and not takes_new:
        raise _unknown(cfg, key, source)
    old = node.get(last)
    if isinstance(old, tuple | list) and isinstance(value, tuple | list):
        value = type(old)(value)
    elif isinstance(old, float) and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    elif old is not None and type(old) is not type(value):
        raise ConfigError(f"{source}: {key} is a {type(old).__name__}, not {value!r}")
    node[last] = value


def _unknown(cfg: CfgNode, key: str, source: str) -> ConfigError:
    if cfg.key_is_renamed(key):  # a file that an earlier version wrote
        cfg.raise_key_rename_error(key)
    near = difflib.get_close_matches(key, list(config_keys(cfg)), n=3, cutoff=0.6)
    return ConfigError(f"{source}: no config key {key}" + (f"; near: {', '.join(near)}" if near else ""))


def _same(a: Any, b: Any) -> bool:
    """Equal, but for the digits that people leave out, and for what is a list and what a tuple."""
    if isinstance(a, tuple | list) and isinstance(b, tuple | list):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, float) and isinstance(b, int | float):
        return math.isclose(a, b, rel_tol=1e-5)
    return bool(a == b)
