"""Key layouts of published checkpoints, told apart by their keys."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor

from clipdense.checkpoint.accounting import DropRule
from clipdense.checkpoint.io import CheckpointError

State = dict[str, Tensor]


@dataclass(frozen=True)
class Layout:
    """How one kind of file names its tensors.

    Attributes:
        name: e.g. "openai_clip".
        about: one line for error messages.
        matches: whether these keys are of this layout.
        convert: from the file's keys to the model's.
        drops: converted keys that are left out on purpose.
        optional: pattern of the model's keys that such a file may lack.
    """

    name: str
    about: str
    matches: Callable[[Mapping[str, Tensor]], bool]
    convert: Callable[[Mapping[str, Tensor]], State]
    drops: tuple[DropRule, ...] = ()
    optional: str | None = None


@dataclass(frozen=True, kw_only=True)
class ModelLayout(Layout):
    """Files of a whole published model, which a config of ours builds.

    Attributes:
        options: from the file's keys, and its classes where they are known, to the config keys that the model
            needs and their values. Raises CheckpointError where tensors determine no model.
        prefixes: from the file's keys to beginnings of keys, the file's -> the model's.
        licence: of the published weights, where it does not allow every use; printed by the converter.
        metadata: from the file's keys, and its classes where they are known, to what the model reads from a
            checkpoint's metadata (`clipdense.open_vocabulary.CheckpointMetadata`).
    """

    options: Callable[[Mapping[str, Tensor], Sequence[str] | None], dict[str, Any]]
    prefixes: Callable[[Mapping[str, Tensor]], dict[str, str]]
    licence: str = ""
    metadata: Callable[[Mapping[str, Tensor], Sequence[str] | None], dict[str, Any]] = lambda *_: {}


def rename(key: str, prefixes: Mapping[str, str]) -> str:
    """The key with the longest of the prefixes that it begins with replaced; as it is where there is none."""
    old = max((prefix for prefix in prefixes if key.startswith(prefix)), key=len, default="")
    return prefixes.get(old, "") + key.removeprefix(old)


LAYOUTS: dict[str, Layout] = {}


AnyLayout = TypeVar("AnyLayout", bound=Layout)


def register_layout(layout: AnyLayout) -> AnyLayout:
    """Add a layout; a room's converter calls this once."""
    if layout.name in LAYOUTS:
        raise ValueError(f"layout '{layout.name}' is registered twice")
    LAYOUTS[layout.name] = layout
    return layout


def detect_layout(state: Mapping[str, Tensor], source: str) -> Layout:
    """The one layout whose keys these are.

    Raises:
        CheckpointError: none or several.
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
