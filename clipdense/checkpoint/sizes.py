"""Sizes of a model that the tensors of its file show."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from clipdense.checkpoint.io import CheckpointError

__all__ = ["config_leaves", "count_parts", "shown_size"]


def count_parts(state: Mapping[str, Tensor], *prefixes: str) -> int:
    """Count the numbered parts below the prefixes, by the highest number."""
    numbers = (re.match(r"\d+", key.removeprefix(p)) for p in prefixes for key in state if key.startswith(p))
    return 1 + max((int(number[0]) for number in numbers if number), default=-1)


def shown_size(state: Mapping[str, Tensor], *places: tuple[str, int]) -> int:
    """Return the size of the first tensor that the file has.

    Args:
        state: tensors by key.
        places: key and axis of tensors that show the size, in order of preference.

    Raises:
        CheckpointError: If the file has none of the keys.
    """
    for key, axis in places:
        if key in state and axis < state[key].ndim:
            return state[key].shape[axis]
    raise CheckpointError(f"it lacks {', '.join(key for key, _ in places)}, from which sizes are read")


def config_leaves(node: Any, key: str) -> Iterator[tuple[str, Any]]:
    """Yield the full config key and the value of every entry of nested dicts."""
    if not isinstance(node, dict):
        yield key, node
        return
    for name, child in node.items():
        yield from config_leaves(child, f"{key}.{name}")
