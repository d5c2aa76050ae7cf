"""What the tensors of a file show about the model that they belong to."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from clipdense.checkpoint.io import CheckpointError

__all__ = ["config_leaves", "count_parts", "shown_size"]


def count_parts(state: Mapping[str, Tensor], *prefixes: str) -> int:
    """How many numbered parts there are below the prefixes, by the highest number."""
    numbers = (re.match(r"\d+", key.removeprefix(p)) for p in prefixes for key in state if key.startswith(p))
    return 1 + max((int(number[0]) for number in numbers if number), default=-1)


def shown_size(state: Mapping[str, Tensor], *places: tuple[str, int]) -> int:
    """The size that most of the places (key, axis) show, so that a wrong tensor is told from the rest.

    Raises:
        CheckpointError: none of the keys is there.
    """
    shown = [state[key].shape[axis] for key, axis in places if key in state and axis < state[key].ndim]
    if not shown:
        raise CheckpointError(f"it lacks {', '.join(key for key, _ in places)}, from which sizes are read")
    return Counter(shown).most_common(1)[0][0]


def config_leaves(node: Any, key: str) -> Iterator[tuple[str, Any]]:
    """(full config key, value) of everything in nested dicts."""
    if not isinstance(node, dict):
        yield key, node
        return
    for name, child in node.items():
        yield from config_leaves(child, f"{key}.{name}")
