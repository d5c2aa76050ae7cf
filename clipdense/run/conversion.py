"""Conversion of published weight files to safetensors with the keys of clipdense."""

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from clipdense.checkpoint import (
    Checkpoint,
    CheckpointError,
    DropRule,
    Layout,
    Report,
    account,
    config_options,
    convert_model,
    detect_layout,
    model_layout,
    read_checkpoint,
    rename,
    save_checkpoint,
)
from clipdense.checkpoint.allowed import allowed_options
from clipdense.clip import load_clip
from clipdense.clip.layouts import MASK_PROMPTS
from clipdense.clip.vocabulary import Vocabulary
from clipdense.data.checks import check_dataset_names, dataset_classes
from clipdense.data.heads import head_classes
from clipdense.engine.options import ConfigError
from clipdense.run.config import add_clipdense_config
from clipdense.run.keys import config_value, set_options

from detectron2.config import CfgNode, get_cfg
from detectron2.data import MetadataCatalog
from detectron2.modeling import build_model

__all__ = ["Conversion", "account_model", "convert_and_describe", "convert_weights"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Conversion:
    """Summary of a conversion.

    Attributes:
        layout: name of the key layout of the published file.
        num_tensors: number of tensors written.
        dropped: name of the rule -> keys that were left out.
        options: config key -> value, as written into the file.
        classes: class names; None if they are not known.
        licence: licence of the published weights; "" if it allows every use.
    """

    layout: str
    num_tensors: int
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
    """Convert a published file to safetensors with the keys of clipdense and the options that it needs.

    The file of a CLIP is converted to one that `load_clip` loads without the name of the model.

    Args:
        source: the published file.
        target: the safetensors file to write.
        classes: class names; they must equal those listed in the file, and are stored if it lists none.
        options: config key -> value where the model differs from the released one; for a CLIP,
            MODEL.CLIP.NAME only. Keys that a weight file may not set (see `clipdense.checkpoint.allowed`),
            such as the path of another file, are used for the comparison and not written.
        allow_pickle: whether to open a pickle, see `read_checkpoint`.

    Returns:
        Summary of what was written and what was left out.

    Raises:
        FileNotFoundError: If there is no such file.
        CheckpointError: If the file cannot be read, has no known layout, lists other classes, or does not
            hold exactly the tensors of a model of its sizes (the message lists all differences). Nothing is
            written.
        ConfigError: If an option does not exist, or classes are given for a CLIP.
    """
    read = read_checkpoint(source, allow_pickle=allow_pickle)
    layout = model_layout(read.state)
    if layout is None:
        known = detect_layout(read.state, str(source))  # raises for an unknown layout
        if classes or set(options or {}) - {"MODEL.CLIP.NAME"}:
            raise ConfigError(f"{source} is a CLIP: give no classes, and no option except MODEL.CLIP.NAME")
        return _convert_clip(read, known, target, (options or {}).get("MODEL.CLIP.NAME", ""), allow_pickle)
    file = convert_model(read, classes)
    cfg = get_cfg()
    add_clipdense_config(cfg)
    needed = {**config_options(file), **(options or {})}
    set_options(cfg, needed, str(source))
    stored = allowed_options(needed)
    if left_out := sorted(needed.keys() - stored):
        logger.warning("Not stored in %s, set it in the config: %s", target, ", ".join(left_out))
    metadata = {**file.metadata, "options": {**file.metadata["options"], "config": stored}}
    report = account_model(cfg, file, drops=layout.drops, optional=layout.optional)
    if not report.complete:
        published_names = {ours: prefix for prefix, ours in layout.prefixes(read.state).items()}
        raise CheckpointError(
            f"{source} (layout {layout.name}) does not match a model of its sizes; nothing was written:\n  "
            + "\n  ".join(_differences(report, published_names))
        )
    dropped = {key for keys in report.dropped.values() for key in keys}
    state = {key: value for key, value in file.state.items() if key not in dropped}
    save_checkpoint(target, state, metadata)
    names = metadata.get(layout.classes)
    return Conversion(layout.name, len(state), _dropped(report, read), stored, names, layout.licence)


def convert_and_describe(
    source: str | Path,
    target: str | Path,
    *,
    dataset: str | None = None,
    classes: str | None = None,
    options: Sequence[str] = (),
    allow_pickle: bool = False,
) -> list[str]:
    """Convert a published file as `convert_weights` does, from the words of a command.

    Args:
        source: the published file.
        target: the safetensors file to write.
        dataset: registered dataset whose classes the file must have.
        classes: class names that the file must have, see `Vocabulary.parse`; not together with ``dataset``.
        options: KEY=VALUE, with values in YAML.
        allow_pickle: whether to open a pickle.

    Returns:
        Lines that tell what was written and what was left out.

    Raises:
        ConfigError: If an option is not KEY=VALUE or does not exist, or the dataset names no classes.
        ValueError: If there is no such dataset.
        CheckpointError: See `convert_weights`.
        FileNotFoundError: See `convert_weights`.
    """
    names = None if classes is None else list(Vocabulary.parse(classes).names)
    done = convert_weights(
        source,
        target,
        classes=names if dataset is None else _classes_of(dataset),
        options=dict(map(_option, options)),
        allow_pickle=allow_pickle,
    )
    lines = [f"{source} has layout {done.layout}; {done.num_tensors} tensors written"]
    lines += [f"left out, {rule}: {', '.join(keys)}" for rule, keys in done.dropped.items()]
    lines.append(
        f"classes: {len(done.classes)}, as listed" if done.classes else "classes: none listed in the file"
    )
    if done.options:
        lines += ["config keys in the file:", *(f"  {key}: {value}" for key, value in done.options.items())]
    lines.append(f"written to {target}")
    return lines + ([f"licence of the published weights: {done.licence}"] if done.licence else [])


def _classes_of(dataset: str) -> list[str]:
    check_dataset_names([dataset])
    detection = MetadataCatalog.get(dataset).get("evaluator_type") in ("coco", "lvis")
    for kind in ("thing", "stuff") if detection else ("stuff", "thing"):
        if classes := dataset_classes(dataset, kind):
            return classes
    raise ConfigError(f"dataset {dataset} names no classes; give them with --classes")


def _option(text: str) -> tuple[str, Any]:
    key, separator, value = text.partition("=")
    if not separator:
        raise ConfigError(f"--option takes KEY=VALUE, not {text!r}")
    try:
        return key, yaml.safe_load(value)
    except yaml.YAMLError as e:
        raise ConfigError(f"--option {key}: {value!r} is not a YAML value") from e


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
    return Conversion(layout.name, len(report.loaded), _dropped(report, read), {}, None)


def _dropped(report: Report, read: Checkpoint) -> dict[str, list[str]]:
    """Return the left-out keys by rule, entries of the file beside its tensors included."""
    return {**report.dropped, **({"not part of the model": sorted(read.extras)} if read.extras else {})}


def account_model(
    cfg: CfgNode, file: Checkpoint, drops: Sequence[DropRule] = (), optional: str | None = None
) -> Report:
    """Compare the keys and shapes of a file with those of the model that a config describes.

    The model is built on the meta device.

    Args:
        cfg: the config of the model.
        file: the weight file under the keys of clipdense.
        drops: rules for keys of the file that are left out.
        optional: regular expression of keys that the file may lack.

    Returns:
        The account of every key.

    Raises:
        CheckpointError: If the model cannot be built.
    """
    cfg = cfg.clone()
    cfg.MODEL.DEVICE = "meta"
    if not (cfg.MODEL.CLIP.PRETRAINED or os.path.isfile(cfg.MODEL.CLIP.NAME)):
        cfg.MODEL.CLIP.PRETRAINED = "random"  # only the sizes matter
    if not cfg.MODEL.LANGUAGE.CLASSES and head_classes(cfg):  # only the number of classes matters
        count_key = head_classes(cfg)[0].key
        cfg.MODEL.LANGUAGE.CLASSES = [str(i) for i in range(config_value(cfg, count_key))]
    try:
        with torch.device("meta"):
            model = build_model(cfg)
    except (ValueError, AssertionError) as e:  # torch asserts that heads divide widths
        raise CheckpointError(f"{file.path}: the model cannot be built from its config ({e})") from e
    return account(model.state_dict(), file.state, drops=drops, optional=optional)


def _differences(report: Report, published_names: Mapping[str, str]) -> list[str]:
    """Describe each difference in a line, with the key's name in the published file."""
    lines = [f"lacks {rename(key, published_names)}" for key in report.missing]
    lines += [f"has {rename(key, published_names)}, which is unknown" for key in report.unexpected]
    return lines + [
        f"has {rename(key, published_names)} {tuple(file)}, not {tuple(model)}"
        for key, (file, model) in report.mismatched.items()
    ]
