"""Conversion of published model files to our keys, with the config keys that their weights need."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from clipdense.checkpoint.allowed import check_options
from clipdense.checkpoint.io import Checkpoint, CheckpointError
from clipdense.checkpoint.layouts import LAYOUTS, ModelLayout

MODEL_LAYOUT = "clipdense"
"""`layout` in the metadata of a file that holds a whole model under our keys.

Its `options` are `config` (config key -> value), and `source` is the name of the layout that the file was
converted from. `thing_classes` or `stuff_classes` are its class names, if known, as training writes them."""


def model_layout(state: Mapping[str, Tensor]) -> ModelLayout | None:
    """Find the layout of a published model by its keys; None for other files."""
    found = [x for x in LAYOUTS.values() if isinstance(x, ModelLayout) and x.matches(state)]
    return found[0] if len(found) == 1 else None


def config_options(file: Checkpoint) -> dict[str, Any]:
    """Return the config keys and values that the weights of a file need; empty if the file has none.

    Raises:
        CheckpointError: If the file sets a key that a weight file may not set, see `ALLOWED_KEYS`.
    """
    if file.metadata.get("layout") != MODEL_LAYOUT:
        return {}
    options: dict[str, Any] = file.metadata.get("options", {}).get("config", {})
    try:
        check_options(options, str(file.path))
    except ValueError as e:
        raise CheckpointError(str(e)) from e
    return options


def convert_model(file: Checkpoint, classes: Sequence[str] | None = None) -> Checkpoint:
    """Convert the file of a published model to our keys; any other file is returned unchanged.

    The result has metadata as `MODEL_LAYOUT` says. Training state (optimizer, epoch) is dropped.

    Args:
        file: the file.
        classes: class names, for a file that does not list them.

    Raises:
        CheckpointError: If the file lists other classes, or its tensors do not determine a model.
    """
    layout = model_layout(file.state)
    if layout is None:
        return file
    meta = file.extras.get("meta")  # mmcv's
    listed = meta.get("CLASSES") if isinstance(meta, Mapping) else None
    if listed and classes and (differences := class_differences(listed, classes)):
        raise CheckpointError(f"{file.path} lists other classes:\n  " + "\n  ".join(differences))
    names = list(listed or classes or ()) or None
    try:
        options: dict[str, Any] = {"config": layout.options(file.state, names)}
        state = layout.convert(file.state)
        model = layout.metadata(file.state, names)
    except CheckpointError as e:
        raise CheckpointError(f"{file.path}, of layout {layout.name}: {e}") from e
    known: dict[str, Any] = {layout.classes: names} if names else {}
    metadata = {**model, **known, "layout": MODEL_LAYOUT, "source": layout.name, "options": options}
    return replace(file, state=state, metadata=metadata, extras={})


def class_differences(listed: Sequence[str], expected: Sequence[str]) -> list[str]:
    """Describe the classes that differ, one line each.

    Case and white space are ignored, because tokenizers ignore them too.

    Args:
        listed: class names of the file.
        expected: class names of the dataset.
    """
    lines = [
        f"class {i}: {a!r} in the file, {b!r} expected"
        for i, (a, b) in enumerate(zip(listed, expected, strict=False))
        if a.lower().split() != b.lower().split()
    ]
    if len(listed) != len(expected):
        lines.insert(0, f"{len(listed)} classes in the file, {len(expected)} expected")
    return lines
