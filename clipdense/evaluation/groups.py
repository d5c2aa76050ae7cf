"""Groups of classes that a data set reports apart."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

__all__ = ["class_attributes", "class_groups"]


def class_groups(metadata: Any, names: Sequence[str]) -> dict[str, list[int]]:
    """Groups that a data set's metadata declares, as positions in `names`.

    ``base_classes`` and ``novel_classes`` (lists of class names) give the groups ``base`` and ``novel``; with
    only one of them, the other holds the rest. ``novel_kinds`` (kind -> class names) gives a group for each
    kind.

    Args:
        metadata: of Detectron2's catalog.
        names: class names of the task, in order.

    Returns:
        Group -> positions; empty groups, and those of another task (stuff among things), are left out.

    Raises:
        ValueError: a list names a class that the data set lacks.
    """
    lists = {group: metadata.get(f"{group}_classes") or () for group in ("base", "novel")}
    lists.update(metadata.get("novel_kinds") or {})
    position = {name: i for i, name in enumerate(names)}
    known = set(position).union(*(metadata.get(f"{kind}_classes") or () for kind in ("thing", "stuff")))
    groups: dict[str, list[int]] = {}
    for group, members in lists.items():
        unknown = [name for name in members if name not in known]
        if unknown:
            near = difflib.get_close_matches(unknown[0], known, n=3)
            hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
            shown = ", ".join(map(repr, unknown[:5]))
            raise ValueError(f"metadata of '{metadata.name}': {group} class {shown} is no class{hint}")
        if found := [position[name] for name in members if name in position]:
            groups[group] = found
    for given, other in (("novel", "base"), ("base", "novel")):
        if given in groups and other not in groups:
            groups[other] = [i for i in range(len(names)) if i not in set(groups[given])]
    return groups


def class_attributes(metadata: Any, names: Sequence[str]) -> dict[str, list[str]]:
    """The metadata's ``class_attributes`` (attribute -> one value a thing class) as one value for each of
    `names`, "" where a class has none.
    """
    things = metadata.get("thing_classes") or []
    listed = metadata.get("class_attributes") or {}
    tables = {name: dict(zip(things, values, strict=False)) for name, values in listed.items()}
    return {name: [table.get(c, "") for c in names] for name, table in tables.items()}
