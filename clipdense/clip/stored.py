"""Model configs in the metadata of CLIP weight files, checked before anything is built from them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

import open_clip

from clipdense.checkpoint import Checkpoint, CheckpointError
from clipdense.checkpoint.allowed import is_plain_name

__all__ = ["stored_config", "stored_text"]

_MAX_SIZE = 10_000_000
_MAX_LAYERS = 1000
_REMEDY = "Download the file again, or convert the published file again (tools/convert_checkpoint.py)"


def stored_config(file: Checkpoint) -> dict[str, Any] | None:
    """Return open_clip's hub config that a CLIP's file brings; None if it has none.

    A weight file may not name anything to download: a text must be a plain name, or one that open_clip's own
    configs use under the same key (SigLIP's tokenizers).

    Raises:
        CheckpointError: If fields are missing, have wrong types, are out of range, or name a path, a URL or
            an unknown hub id. The message names the file.
    """
    config = file.metadata.get("options", {}).get("config")
    if config is None or file.metadata.get("layout") == "clipdense":
        return None
    try:
        _check(config)
    except ValueError as e:
        raise CheckpointError(
            f"{file.path}: the model config in its metadata is damaged: {e}. {_REMEDY}"
        ) from e
    result: dict[str, Any] = config
    return result


def stored_text(file: Checkpoint) -> bool:
    """Return whether a CLIP's file has a text tower, as far as its metadata says; True by default."""
    return bool(file.metadata.get("options", {}).get("text", True))


def _check(config: Mapping[str, Any]) -> None:
    for key in ("model_cfg", "preprocess_cfg"):
        if not isinstance(config.get(key), Mapping):
            raise ValueError(f"{key} is missing or not a dictionary")
    model = config["model_cfg"]
    for key in ("vision_cfg", "text_cfg"):
        if not isinstance(model.get(key), Mapping):
            raise ValueError(f"model_cfg.{key} is missing or not a dictionary")
    _require_size(model.get("embed_dim"), "model_cfg.embed_dim")
    if not isinstance(model.get("quick_gelu", False), bool):
        raise ValueError(f"model_cfg.quick_gelu must be true or false, got {model['quick_gelu']!r}")
    size = model["vision_cfg"].get("image_size")
    sides = size if isinstance(size, list) and len(size) == 2 else [size]
    for side in sides:
        _require_size(side, "model_cfg.vision_cfg.image_size")
    for key in ("mean", "std"):
        values = config["preprocess_cfg"].get(key)
        if not (isinstance(values, list) and len(values) == 3 and all(_is_number(v) for v in values)):
            raise ValueError(f"preprocess_cfg.{key} must be three numbers, got {values!r}")
    for key, value in _leaves(model):
        _check_leaf(key, value)


def _check_leaf(key: str, value: Any) -> None:
    if isinstance(value, str) and not is_plain_name(value) and value not in _known_names():
        raise ValueError(f"model_cfg.{key} is {value[:80]!r}, expected a name, not a path, a URL or a hub id")
    if _is_number(value):
        limit = _MAX_LAYERS if key.endswith(("layers", "depth", "heads")) else _MAX_SIZE
        if not abs(value) <= limit:
            raise ValueError(f"model_cfg.{key} is {value}, expected at most {limit}")


def _leaves(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(node, Mapping):
        for key, value in node.items():
            yield from _leaves(value, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(node, list):
        for value in node:
            yield from _leaves(value, prefix)
    else:
        yield prefix, node


@cache
def _known_names() -> frozenset[str]:
    """Texts in open_clip's own configs, with the hub ids of their tokenizers and text towers."""
    configs = (open_clip.get_model_config(name) for name in open_clip.list_models())
    return frozenset(v for config in configs for _, v in _leaves(config) if isinstance(v, str))


def _require_size(value: Any, name: str) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= _MAX_SIZE:
        raise ValueError(f"{name} must be a positive whole number, got {value!r}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
