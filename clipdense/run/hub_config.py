"""Configs that travel with weights: what they may set, and which of a run's keys go into them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import open_clip

from clipdense.checkpoint.allowed import is_plain_name
from clipdense.clip.nano import NANO_MODELS
from clipdense.clip.sources import RANDOM, RANDOM_OF
from clipdense.engine.options import ConfigError
from clipdense.run.config import add_clipdense_config
from clipdense.run.config_file import load_yaml
from clipdense.run.config_rules import PATH_KEYS
from clipdense.run.keys import config_keys, config_value

from detectron2.config import CfgNode, get_cfg

__all__ = ["companion_files", "portable_keys", "read_portable_config"]

_ROOMS = ("MODEL.", "INPUT.", "TEST.")
# Where texts are sentences or class names. They are only passed to a tokenizer.
_FREE_TEXT = re.compile(r"MODEL\..*(TEMPLATES|CLASSES)")
# Decided by the machine that runs the model.
_LOCAL = ("MODEL.WEIGHTS", "MODEL.DEVICE", "MODEL.ALLOW_PICKLE", "MODEL.FETCH_WEIGHTS", "MODEL.WEIGHTS_SKIP")
_MASK_SOURCE = "MODEL.MASK_FORMER.TEST.MASK_SOURCE"


def read_portable_config(path: Path) -> dict[str, Any]:
    """Read the config of a model folder that may come from somewhere else, and check what it sets.

    Args:
        path: ``config.yaml`` of the folder.

    Returns:
        Full config key -> value.

    Raises:
        ConfigError: If the file cannot be read, includes another file, sets a key outside MODEL, INPUT and
            TEST, allows pickles, or names a file outside its folder or a download that is not open_clip's.
    """
    content = load_yaml(path)
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected keys and values, not {type(content).__name__}")
    if "_BASE_" in content:
        raise ConfigError(f"{path}: _BASE_ names another file; a model folder holds its whole config")
    if wrong := [key for key in content if not isinstance(key, str)]:
        raise ConfigError(f"{path}: the key {wrong[0]!r} is not text")
    keys = {key: _value(content, key) for key in config_keys(content) if key != "VERSION"}
    for key, value in keys.items():
        if (problem := _problem(key, value)) is not None:
            raise ConfigError(f"{path}: {problem}")
    return keys


def companion_files(keys: Mapping[str, Any]) -> dict[str, str]:
    """Return the keys of a model folder's config that name a file in the folder, and the file names."""
    return {key: value for key, value in keys.items() if key in PATH_KEYS and _is_companion(value)}


def portable_keys(cfg: CfgNode) -> tuple[dict[str, Any], dict[str, Path]]:
    """Collect the keys of a run's config that prediction with its model needs.

    Keys of training, datasets and folders are left out, and so are keys that have their default value.

    Args:
        cfg: config of the run.

    Returns:
        Full config key -> value, and the keys that name a file -> that file, which has to be copied into the
        folder. Their value is already the file's new name.

    Raises:
        ConfigError: If a key names a file that is not safetensors, or a value cannot travel.
    """
    defaults = get_cfg()
    add_clipdense_config(defaults)
    keys: dict[str, Any] = {}
    files: dict[str, Path] = {}
    for key in config_keys(cfg):
        value = config_value(cfg, key)
        if not key.startswith(_ROOMS) or key in _LOCAL or value == config_value(defaults, key, _Missing):
            continue
        if key in PATH_KEYS and isinstance(value, str) and Path(value).is_file():
            if Path(value).suffix != ".safetensors":
                raise ConfigError(
                    f"{key} names {value}, which is not a safetensors file; convert it with "
                    "tools/convert_checkpoint.py, and set the key to the new file"
                )
            files[key] = Path(value)
            value = f"{key.lower().replace('.', '_').removeprefix('model_')}.safetensors"
        if (problem := _problem(key, value)) is None:
            keys[key] = value
        elif key.startswith("MODEL."):
            raise ConfigError(f"the config of the run cannot travel: {problem}")
    return keys, files


class _Missing:
    """Marks keys that a config lacks."""


def _value(content: Mapping[str, Any], key: str) -> Any:
    node: Any = content
    for part in key.split("."):
        node = node[part]
    return node


def _problem(key: str, value: Any) -> str | None:
    """Describe what is wrong with a key of a model folder's config; None if it is fine."""
    if not key.startswith(_ROOMS):
        return f"it sets {key}; a model folder may only set keys of MODEL, INPUT and TEST. Remove the key"
    if key in _LOCAL:
        return f"it sets {key}, which only the user may set. Remove the key"
    if key in PATH_KEYS:
        return None if _may_name(key, value) else _not_a_name(key, value)
    if _FREE_TEXT.fullmatch(key):
        return None
    wrong = next((text for text in _texts(value) if not is_plain_name(text)), None)
    return None if wrong is None else _not_a_name(key, wrong)


def _not_a_name(key: str, value: Any) -> str:
    return (
        f"it sets {key} to {str(value)[:80]!r}; expected a name that clipdense or open_clip knows, or a "
        ".safetensors file in the same folder, not a path, a URL or a hub id"
    )


def _may_name(key: str, value: Any) -> bool:
    """Return whether the value of a key that could be a path stays within the folder."""
    if value in ("", None, [], ()) or _is_companion(value):
        return True
    if not isinstance(value, str):
        return False
    if key == _MASK_SOURCE:
        return value in ("network", "ground_truth")
    if key.startswith("MODEL.TIMM"):
        return is_plain_name(value)
    if key.endswith((".NAME", ".LOCKED_TEXT")):
        return value in NANO_MODELS or value.replace("/", "-") in open_clip.list_models()
    if key.endswith(".PRETRAINED"):
        tags = {tag for _, tag in open_clip.list_pretrained()}
        return value == RANDOM or value.removeprefix(RANDOM_OF) in tags
    return False


def _is_companion(value: Any) -> bool:
    return (isinstance(value, str) and re.fullmatch(r"\w[\w.-]*\.safetensors", value) is not None) and Path(
        value
    ).name == value


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, entry in value.items():
            yield from _texts(key)
            yield from _texts(entry)
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from _texts(entry)
