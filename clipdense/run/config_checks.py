"""Checks of config values: what a value must be, and the errors that name the key.

`clipdense.run.config_table` declares the check of each key; all other keys keep the type of their default.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch

from clipdense.engine.options import ConfigError

__all__ = [
    "Check",
    "check_values",
    "choice",
    "device",
    "either",
    "item_of",
    "items",
    "matches_type",
    "nothing",
    "number",
    "parsed",
    "shown",
    "text",
    "whole",
]

# Return what is expected if the value is wrong, else None.
Check = Callable[[Any], str | None]
_MAX_SHOWN = 80
_MAX_LISTED = 24


def check_values(values: Mapping[str, Any], checks: Mapping[str, Check]) -> None:
    """Check the values of config keys.

    Args:
        values: full key -> value.
        checks: full key -> check; keys that ``values`` lacks are not checked.

    Raises:
        ConfigError: If a value is wrong; names the key, the value and what is expected.
    """
    for key, check in checks.items():
        if key in values and (expected := check(values[key])) is not None:
            raise ConfigError(f"{key} is {shown(values[key])}; expected {expected}")


def shown(value: Any) -> str:
    """Return a value for a message, shortened to one line."""
    text = " ".join(repr(value).split())
    return text if len(text) <= _MAX_SHOWN else f"{text[: _MAX_SHOWN - 3]}..."


def whole(least: int | None = None, most: int | None = None) -> Check:
    """Return the check for a whole number from ``least`` to ``most``, both included."""

    def check(value: Any) -> str | None:
        right = isinstance(value, int) and not isinstance(value, bool) and _in_range(value, least, most)
        return None if right else f"a whole number{_range(least, most)}"

    return check


def number(
    least: float | None = None,
    most: float | None = None,
    *,
    above: float | None = None,
    below: float | None = None,
) -> Check:
    """Return the check for a finite number from ``least`` to ``most``, or above and below a bound."""

    def check(value: Any) -> str | None:
        right = (
            isinstance(value, int | float)
            and not isinstance(value, bool)
            and math.isfinite(value)
            and _in_range(value, least, most)
            and (above is None or value > above)
            and (below is None or value < below)
        )
        bounds = [_range(least, most)] if least is not None or most is not None else []
        bounds += [f" above {above:g}"] if above is not None else []
        bounds += [f" below {below:g}"] if below is not None else []
        return None if right else f"a finite number{' and'.join(bounds)}"

    return check


def text(pattern: str = "", expected: str = "") -> Check:
    """Return the check for text that matches a regular expression completely; without one, for any text."""

    def check(value: Any) -> str | None:
        right = isinstance(value, str) and (not pattern or re.fullmatch(pattern, value))
        return None if right else expected or "text"

    return check


def choice(*names: str) -> Check:
    """Return the check for one of some names; the message suggests a similar one."""
    return item_of(lambda: names)


def item_of(names: Callable[[], Iterable[str]]) -> Check:
    """Return the check for one of the names that a function lists, such as the entries of a registry."""

    def check(value: Any) -> str | None:
        known = list(names())
        return None if isinstance(value, str) and value in known else _one_of(value, known)

    return check


def items(each: Check | None = None, *, length: int | Collection[int] = (), least: int = 0) -> Check:
    """Return the check for a list or tuple.

    Args:
        each: check of every entry.
        length: the permitted numbers of entries; empty for any.
        least: smallest number of entries.
    """
    lengths = [length] if isinstance(length, int) else list(length)

    def check(value: Any) -> str | None:
        if not isinstance(value, list | tuple):
            return "a list"
        if lengths and len(value) not in lengths:
            return f"a list of {' or '.join(map(str, lengths))} entries"
        if len(value) < least:
            return f"a list of at least {least} {'entry' if least == 1 else 'entries'}"
        for entry in value:
            if each is not None and (expected := each(entry)) is not None:
                return f"entries that are each {expected}, not {shown(entry)}"
        return None

    return check


def either(*checks: Check) -> Check:
    """Return the check that one of several checks holds."""

    def check(value: Any) -> str | None:
        found = [check(value) for check in checks]
        return None if None in found else " or ".join(dict.fromkeys(str(expected) for expected in found))

    return check


def nothing(value: Any) -> str | None:
    """Check that a value is None."""
    return None if value is None else "None"


def device(value: Any) -> str | None:
    """Check that a value names a device of PyTorch."""
    try:
        return None if isinstance(value, str) and torch.device(value) else "a device, such as cuda or cpu"
    except RuntimeError:
        return "a device, such as cuda, cuda:0 or cpu"


def parsed(parse: Callable[[Any], object], what: str) -> Check:
    """Return the check that a function accepts the value; the message continues that of its ValueError."""

    def check(value: Any) -> str | None:
        try:
            parse(value)
        except (ValueError, TypeError, AttributeError) as error:
            return f"{what} ({error})"
        return None

    return check


def matches_type(default: Any) -> Check:
    """Return the check that a value has the type of a default value, and holds only finite numbers."""

    def check(value: Any) -> str | None:
        if default is None:
            same = True
        elif isinstance(default, list | tuple):
            same = isinstance(value, list | tuple)
        elif isinstance(default, float):
            same = isinstance(value, int | float) and not isinstance(value, bool)
        else:
            same = type(value) is type(default)
        if not same:
            return _type_name(default)
        return None if _finite(value) else "finite numbers, not NaN or infinity"

    return check


def _type_name(default: Any) -> str:
    names = {bool: "True or False", int: "a whole number", float: "a number", str: "text"}
    return names.get(type(default), "a list" if isinstance(default, list | tuple) else type(default).__name__)


def _finite(value: Any) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, list | tuple):
        return all(map(_finite, value))
    return all(map(_finite, value.values())) if isinstance(value, dict) else True


def _in_range(value: float, least: float | None, most: float | None) -> bool:
    return (least is None or value >= least) and (most is None or value <= most)


def _range(least: float | None, most: float | None) -> str:
    if least is None and most is None:
        return ""
    if most is None:
        return f" of at least {least:g}"
    return f" of at most {most:g}" if least is None else f" from {least:g} to {most:g}"


def _one_of(value: Any, known: list[str]) -> str:
    near = difflib.get_close_matches(str(value), known, n=2, cutoff=0.5)
    shortened = known if len(known) <= _MAX_LISTED else near
    names = ", ".join(name or repr(name) for name in shortened)
    hint = f" (did you mean {' or '.join(near)}?)" if near else ""
    return f"one of {names}{hint}" if names else f"one of {len(known)} known names"
