"""Config keys by their full names: listing, setting, unknown and renamed keys."""

import difflib
from collections.abc import Iterator, Mapping
from typing import Any

from clipdense.engine.options import ConfigError

from detectron2.config import CfgNode

__all__ = ["config_keys", "config_value", "renamed_key", "set_options", "unknown_key_error"]


def set_options(cfg: CfgNode, options: Mapping[str, Any], source: str) -> None:
    """Set config keys by their full names (in place), converting lists, tuples and ints to the key's type.

    Args:
        cfg: the config.
        options: full key -> value.
        source: name of the file or option that sets them, for error messages.

    Raises:
        ConfigError: If a key does not exist or was renamed, or a value has another type.
    """
    for key, value in options.items():
        _set(cfg, key, value, source)


def config_keys(cfg: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield the full names of all keys of a config.

    Args:
        cfg: a node of the config, or the nested dicts of a config file.
        prefix: full name of the node, with a full stop at its end.
    """
    for key, value in cfg.items():
        if isinstance(value, Mapping):
            yield from config_keys(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def config_value(cfg: CfgNode, key: str, default: Any = None) -> Any:
    """Return the value of a key by its full name, or ``default`` if there is no such key."""
    node: Any = cfg
    for part in key.split("."):
        if not isinstance(node, CfgNode) or part not in node:
            return default
        node = node[part]
    return node


def _similar_keys(cfg: CfgNode, key: str) -> list[str]:
    """Return up to three keys whose full name, or whose last part, is like that of an unknown key."""
    known = list(config_keys(cfg))
    last = key.rpartition(".")[2]  # the right name may stand in the wrong place
    similar = {*difflib.get_close_matches(key, known, n=3, cutoff=0.75)}
    similar |= {k for k in known if k.rpartition(".")[2] == last}
    return sorted(similar, key=lambda k: -difflib.SequenceMatcher(None, key, k).ratio())[:3]


def unknown_key_error(cfg: CfgNode, key: str, source: str) -> ConfigError:
    """Describe an unknown or renamed key.

    Args:
        cfg: the config with all known keys.
        key: full name of the key that is not among them.
        source: name of the file or option that sets it.

    Returns:
        The error, which names the new key or similar keys.
    """
    if new := renamed_key(cfg, key):
        return ConfigError(f"{source}: the config key {key} is now {new}; use the new name")
    similar = _similar_keys(cfg, key)
    hint = f"Did you mean {' or '.join(similar)}?" if similar else "No known key has a similar name."
    return ConfigError(f"{source}: unknown config key {key}. {hint}")


def renamed_key(cfg: CfgNode, key: str) -> str | None:
    """Return the new name of a config key that a room has registered as renamed; None for other keys."""
    if not cfg.key_is_renamed(key):
        return None
    try:
        cfg.raise_key_rename_error(key)
    except KeyError as error:
        return str(error.args[0]).partition(" was renamed to ")[2].partition("; please")[0]
    return None


def _set(cfg: CfgNode, key: str, value: Any, source: str) -> None:
    """Set an existing key, or a new key below a node that allows new keys; convert types as yacs does."""
    if cfg.key_is_renamed(key):
        raise unknown_key_error(cfg, key, source)
    *parents, last = key.split(".")
    node, new_allowed = cfg, False
    for part in parents:
        if new_allowed and part not in node:
            node[part] = CfgNode()
        if not isinstance(node.get(part), CfgNode):
            raise unknown_key_error(cfg, key, source)
        node = node[part]
        new_allowed |= node.is_new_allowed()
    if last not in node and not new_allowed:
        raise unknown_key_error(cfg, key, source)
    old = node.get(last)
    if isinstance(old, tuple | list) and isinstance(value, tuple | list):
        value = type(old)(value)
    elif isinstance(old, float) and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    elif old is not None and type(old) is not type(value):
        raise ConfigError(f"{source}: {key} must be of type {type(old).__name__}, got {value!r}")
    node[last] = value
