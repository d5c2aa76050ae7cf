"""Files of published models as files of our own, which bring the config keys that their weights need."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from clipdense.checkpoint.io import Checkpoint, CheckpointError
from clipdense.checkpoint.layouts import LAYOUTS, ModelLayout

MODEL_LAYOUT = "clipdense"
"""`layout` in the metadata of a file that holds a whole model under our keys.

Its `options` are `config` (config key -> value) and, where they are known, `classes`; `source` is the name of
the layout that it was converted from."""


def model_layout(state: Mapping[str, Tensor]) -> ModelLayout | None:
    """The layout of a published model whose keys these are."""
    found = [x for x in LAYOUTS.values() if isinstance(x, ModelLayout) and x.matches(state)]
    return found[0] if len(found) == 1 else None


def config_options(file: Checkpoint) -> dict[str, Any]:
    """The config keys that a file's weights need, and their values; none for files that say nothing."""
    if file.metadata.get("layout") != MODEL_LAYOUT:
        return {}
    options: dict[str, Any] = file.metadata.get("options", {}).get("config", {})
    return options


def convert_model(file: Checkpoint, classes: Sequence[str] | None = None) -> Checkpoint:
    """A published model's file under our keys, with metadata as `MODEL_LAYOUT`; any other file as it is.

    What a training left in it beside the tensors is left out.

    Args:
        classes: names of the classes, for a file that lists none.

    Raises:
        CheckpointError: the file lists other classes, or its tensors determine no model.
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
    if names:
        options["classes"] = names
    metadata = {**model, "layout": MODEL_LAYOUT, "source": layout.name, "options": options}
    return replace(file, state=state, metadata=metadata, extras={})


def class_differences(listed: Sequence[str], wanted: Sequence[str]) -> list[str]:
    """One line for every class that differs; capitals and white space, which no tokenizer sees, do not count.

    Args:
        listed: of the file; wanted: of the data.
    """
    lines = [
        f"class {i}: {a!r} in the file, {b!r} wanted"
        for i, (a, b) in enumerate(zip(listed, wanted, strict=False))
        if a.lower().split() != b.lower().split()
    ]
    if len(listed) != len(wanted):
        lines.insert(0, f"{len(listed)} classes in the file, {len(wanted)} wanted")
    return lines
