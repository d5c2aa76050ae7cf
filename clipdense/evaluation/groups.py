"""Groups of classes for which a dataset reports separate metrics."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

__all__ = ["class_attributes", "class_groups", "thing_groups"]


def class_groups(metadata: Any, names: Sequence[str]) -> dict[str, list[int]]:
    """Read the groups of classes from a dataset's metadata.

    ``base_classes`` and ``novel_classes`` (lists of class names) define the groups ``base`` and ``novel``; if
    only one of them is given, the other group holds the remaining classes. ``novel_kinds`` (kind -> class
    names) defines a group for each kind.

    Args:
        metadata: an entry of Detectron2's ``MetadataCatalog``.
        names: class names of the task, in order.

    Returns:
        Group -> positions in ``names`` (all of a name that several classes share), without empty groups.
        Classes of another task (stuff for a thing task) are left out.

    Raises:
        ValueError: If a list names a class that the dataset lacks.
    """
    lists = {group: metadata.get(f"{group}_classes") or () for group in ("base", "novel")}
    lists.update(metadata.get("novel_kinds") or {})
    positions: dict[str, list[int]] = {}
    for i, name in enumerate(names):
        positions.setdefault(name, []).append(i)
    known = set(positions).union(*(metadata.get(f"{kind}_classes") or () for kind in ("thing", "stuff")))
    groups: dict[str, list[int]] = {}
    for group, members in lists.items():
        unknown = [name for name in members if name not in known]
        if unknown:
            near = difflib.get_close_matches(unknown[0], known, n=3)
            hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
            shown = ", ".join(map(repr, unknown[:5]))
            raise ValueError(f"metadata of '{metadata.name}': {group} class {shown} is not a class{hint}")
        if found := [i for name in dict.fromkeys(members) for i in positions.get(name, ())]:
            groups[group] = found
    for group, other in (("novel", "base"), ("base", "novel")):
        if group in groups and other not in groups:
            groups[other] = [i for i in range(len(names)) if i not in set(groups[group])]
    return groups


def thing_groups(metadata: Any, names: Sequence[str]) -> dict[str, list[int]]:
    """Read which of ``names`` are things and which are stuff from a dataset's metadata.

    Returns:
        ``thing`` and ``stuff`` -> positions in ``names``. Empty without stuff, or if
        ``thing_dataset_id_to_contiguous_id`` is not given or numbers another list of classes, as in
        Detectron2's separated panoptic datasets.
    """
    things = set((metadata.get("thing_dataset_id_to_contiguous_id") or {}).values())
    numbered = metadata.get("thing_classes") or names
    stuff = [i for i in range(len(names)) if i not in things]
    if not things or not stuff or list(numbered) != list(names):
        return {}
    return {"thing": sorted(things), "stuff": stuff}


def class_attributes(metadata: Any, names: Sequence[str]) -> dict[str, list[str]]:
    """Read ``class_attributes`` (attribute -> one value for each thing class) from a dataset's metadata.

    Returns:
        Attribute -> one value for each of ``names``; "" for a class without a value.
    """
    things = metadata.get("thing_classes") or []
    listed = metadata.get("class_attributes") or {}
    tables = {name: dict(zip(things, values, strict=False)) for name, values in listed.items()}
    return {name: [table.get(c, "") for c in names] for name, table in tables.items()}
