"""Types of the metadata of weight files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["check_metadata"]

_CLASS_LISTS = ("thing_classes", "stuff_classes")


def check_metadata(metadata: Any) -> None:
    """Check the types of a weight file's metadata.

    Args:
        metadata: decoded metadata: ``layout`` and ``source`` are names, ``options`` a dict with ``config``
            (a dict), ``thing_classes`` and ``stuff_classes`` lists of names. Every entry is optional.

    Raises:
        ValueError: If a type is wrong; the message names the entry.
    """
    _require(metadata, Mapping, "metadata", "a dictionary")
    for key in ("layout", "source"):
        if metadata.get(key) is not None:
            _require(metadata[key], str, key, "a name")
    for key in _CLASS_LISTS:
        _require_names(metadata.get(key), key)
    options = metadata.get("options", {})
    _require(options, Mapping, "options", "a dictionary")
    config = options.get("config", {})
    _require(config, Mapping, "options.config", "a dictionary")
    if any(not isinstance(key, str) for key in config):
        raise ValueError("the keys of options.config must be names")
    if "classes" in options:
        raise ValueError(
            "options.classes is where an older version wrote class names, which are now thing_classes or "
            "stuff_classes: convert the published file again"
        )


def _require(value: Any, kind: type, name: str, expected: str) -> None:
    if not isinstance(value, kind):
        raise ValueError(f"{name} must be {expected}, got {str(value)[:60]!r}")


def _require_names(value: Any, name: str) -> None:
    if value is None:
        return
    if not isinstance(value, list | tuple) or not all(isinstance(entry, str) for entry in value):
        raise ValueError(f"{name} must be a list of class names, got {str(value)[:60]!r}")
