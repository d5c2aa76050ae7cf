"""Key layouts of published checkpoints, detected by their keys."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from torch import Tensor

from clipdense.checkpoint.accounting import DropRule
from clipdense.checkpoint.io import CheckpointError

State = dict[str, Tensor]


@dataclass(frozen=True)
class Layout:
    """Key names of one kind of file.

    Attributes:
        name: e.g. "openai_clip".
        about: one-line description for error messages.
        matches: returns whether a state dict has this layout.
        convert: renames the file's keys to the model's keys.
        drops: rules for converted keys that are ignored.
        optional: regular expression of the model's keys that such a file may lack.
    """

    name: str
    about: str
    matches: Callable[[Mapping[str, Tensor]], bool]
    convert: Callable[[Mapping[str, Tensor]], State]
    drops: tuple[DropRule, ...] = ()
    optional: str | None = None


@dataclass(frozen=True, kw_only=True)
class ModelLayout(Layout):
    """Layout of files of a whole published model, which one of our configs builds.

    Attributes:
        classes: metadata entry for the class names of a file: "thing_classes" of detectors, "stuff_classes"
            of models with one list for all classes.
        options: takes the tensors of the file and its class names (None if unknown); returns the config keys
            that the model needs, with their values. Raises CheckpointError if the tensors do not determine a
            model.
        prefixes: takes the tensors of the file; returns key prefixes, of the file -> of the model.
        licence: licence of the published weights if it restricts their use; the converter prints it.
        metadata: from the file's keys, and its classes where they are known, to what the model reads from a
            checkpoint's metadata (`clipdense.open_vocabulary.CheckpointMetadata`).
    """

    options: Callable[[Mapping[str, Tensor], Sequence[str] | None], dict[str, Any]]
    prefixes: Callable[[Mapping[str, Tensor]], dict[str, str]]
    classes: Literal["thing_classes", "stuff_classes"] = "stuff_classes"
    licence: str = ""
    metadata: Callable[[Mapping[str, Tensor], Sequence[str] | None], dict[str, Any]] = lambda *_: {}


def rename(key: str, prefixes: Mapping[str, str]) -> str:
    """Replace the longest matching prefix of a key; return the key unchanged if no prefix matches."""
    old = max((prefix for prefix in prefixes if key.startswith(prefix)), key=len, default="")
    return prefixes.get(old, "") + key.removeprefix(old)


LAYOUTS: dict[str, Layout] = {}


AnyLayout = TypeVar("AnyLayout", bound=Layout)


def register_layout(layout: AnyLayout) -> AnyLayout:
    """Register a layout; called once by the module that converts it.

    Raises:
        ValueError: If a layout of that name exists.
    """
    if layout.name in LAYOUTS:
        raise ValueError(f"layout '{layout.name}' is registered twice")
    LAYOUTS[layout.name] = layout
    return layout


def detect_layout(state: Mapping[str, Tensor], source: str) -> Layout:
    """Detect the layout of a state dict by its keys.

    Raises:
        CheckpointError: If no layout or several layouts match.
    """
    found = [layout for layout in LAYOUTS.values() if layout.matches(state)]
    if len(found) == 1:
        return found[0]
    known = "; ".join(f"{layout.name} ({layout.about})" for layout in LAYOUTS.values())
    verdict = (
        f"fits several layouts ({', '.join(x.name for x in found)})" if found else "is of no known layout"
    )
    raise CheckpointError(
        f"{source} {verdict}. Known: {known}. Its first keys: {', '.join(list(state)[:12])}"
    )
