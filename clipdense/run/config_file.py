"""Reading of YAML config files: safe, with `_BASE_`, and with errors that name the file."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from clipdense.engine.options import ConfigError

from detectron2.config import CfgNode

__all__ = ["load_yaml", "merge_config_file", "read_config_file"]

logger = logging.getLogger(__name__)

_BASE = "_BASE_"
_SUFFIXES = (".yaml", ".yml")
_MAX_BYTES = 2**22


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, which also knows tuples: old versions of yacs write them with a tag."""


def _construct_tuple(loader: _Loader, node: yaml.SequenceNode) -> tuple[Any, ...]:
    return tuple(loader.construct_sequence(node, deep=True))


_Loader.add_constructor("tag:yaml.org,2002:python/tuple", _construct_tuple)


def load_yaml(path: str | os.PathLike[str]) -> Any:
    """Load a YAML file without running any of its tags; only plain values and tuples are built.

    Raises:
        ConfigError: If the file cannot be read, is not YAML, or has a tag that would run code. Names the file
            and the line.
    """
    path = Path(path)
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise ConfigError(f"{path}: larger than {_MAX_BYTES // 2**20} MB, so not a config file")
        return yaml.load(path.read_text("utf-8"), _Loader)  # noqa: S506 (a safe loader)
    except yaml.constructor.ConstructorError as error:
        raise ConfigError(
            f"{path}: {_line(error)}{error.problem}; tags that build objects are refused"
        ) from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: {_line(error)}not valid YAML ({_problem(error)})") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not a text file in UTF-8 ({error.reason})") from error
    except RecursionError as error:
        raise ConfigError(f"{path}: nested too deeply") from error
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror or error})") from error


def read_config_file(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a config file and the files that its `_BASE_` names; what stands in a file wins over its bases.

    A file that sets ``SOLVER.MAX_ITER`` but not ``SOLVER.MAX_SECONDS`` lifts the time limit of its bases.

    Args:
        path: a .yaml file. `_BASE_` is a path, or a list of paths, absolute or relative to the file's folder;
            ``~`` is expanded.

    Returns:
        Nested dicts of keys and values, without `_BASE_`.

    Raises:
        ConfigError: If a file cannot be read (see `load_yaml`), is not a mapping of text keys, contains
            itself, or a base is a URL or not a .yaml file.
    """
    return _read(Path(path), ())


def merge_config_file(cfg: CfgNode, path: str | os.PathLike[str]) -> dict[str, Any]:
    """Set the keys of a config file in ``cfg`` (in place), as `CfgNode.merge_from_file` does, but safely.

    Returns:
        The keys and values of the file and its bases, and its VERSION.

    Raises:
        ConfigError: If the file cannot be read (see `read_config_file`).
        KeyError, ValueError, AssertionError: If a key is unknown or a value has the wrong type (yacs).
    """
    content = read_config_file(path)
    _check_nodes(content, cfg, Path(path))
    old = "WEIGHT" in content.get("MODEL", ()) or "AUG_ON" in content.get("TEST", ())  # as Detectron2 guesses
    version = content.setdefault("VERSION", 1 if old else cfg.VERSION)
    if version not in (1, cfg.VERSION) or isinstance(version, bool):
        raise ConfigError(f"{path}: VERSION is {version!r}; expected {cfg.VERSION}")
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder, Path(path).name)
        plain.write_text(yaml.safe_dump(content, allow_unicode=True), "utf-8")
        cfg.merge_from_file(str(plain), allow_unsafe=False)  # upgrades configs of older versions
    return content


def _read(path: Path, opened: tuple[Path, ...]) -> dict[str, Any]:
    resolved = path.resolve()
    if resolved in opened:
        raise ConfigError(f"{path}: {_BASE} names a file that includes it: {' -> '.join(map(str, opened))}")
    content = load_yaml(path)
    if content is None:
        raise ConfigError(f"{path}: the file is empty")
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected keys and values, not {type(content).__name__}")
    _check_keys(content, path, ())
    base = content.pop(_BASE, ())
    bases = base if isinstance(base, list) else [base] if base != () else []
    merged: dict[str, Any] = {}
    for name in bases:
        _merge(_read(_base_path(path, name), (*opened, resolved)), merged, path)
    _lift_time_limit(content, merged, path)
    _merge(content, merged, path)
    return merged


def _lift_time_limit(content: Mapping[str, Any], base: dict[str, Any], path: Path) -> None:
    """Remove the ``SOLVER.MAX_SECONDS`` of a base config if a file sets ``SOLVER.MAX_ITER`` alone."""
    own, solver = content.get("SOLVER"), base.get("SOLVER")
    if not isinstance(own, dict) or not isinstance(solver, dict) or not solver.get("MAX_SECONDS"):
        return
    if "MAX_ITER" in own and "MAX_SECONDS" not in own:
        logger.warning(
            "%s sets SOLVER.MAX_ITER, so SOLVER.MAX_SECONDS %s of its base config does not apply. To keep "
            "the limit, set SOLVER.MAX_SECONDS as well.",
            path,
            solver.pop("MAX_SECONDS"),
        )


def _base_path(path: Path, name: Any) -> Path:
    if not isinstance(name, str) or not name:
        raise ConfigError(f"{path}: {_BASE} is {name!r}; it names a .yaml file")
    if "://" in name:
        raise ConfigError(f"{path}: {_BASE} {name} is a URL; download the file and name it")
    base = path.parent / Path(os.path.expandvars(name)).expanduser()
    if base.suffix not in _SUFFIXES:
        raise ConfigError(f"{path}: {_BASE} {name} is not a .yaml file")
    if not base.is_file():
        raise ConfigError(f"{path}: {_BASE} names {base}, which does not exist")
    return base


def _check_keys(node: Mapping[Any, Any], path: Path, parents: tuple[int, ...]) -> None:
    if id(node) in parents:
        raise ConfigError(f"{path}: an anchor contains itself")
    for key, value in node.items():
        if not isinstance(key, str):
            raise ConfigError(f"{path}: the key {key!r} is not text")
        for item in value if isinstance(value, list | tuple) else (value,):
            if item is node or id(item) in parents:
                raise ConfigError(f"{path}: the value of {key} contains itself")
        if isinstance(value, dict):
            _check_keys(value, path, (*parents, id(node)))


def _check_nodes(content: Mapping[str, Any], cfg: CfgNode, path: Path, prefix: str = "") -> None:
    """Check that the groups of keys of a config stay groups; yacs would replace one by None."""
    for key, value in content.items():
        if not isinstance(known := cfg.get(key), CfgNode):
            continue
        if not isinstance(value, dict):
            raise ConfigError(f"{path}: {prefix}{key} is a group of keys, but is {value!r} here")
        _check_nodes(value, known, path, f"{prefix}{key}.")


def _merge(new: Mapping[str, Any], into: dict[str, Any], path: Path) -> None:
    for key, value in new.items():
        old = into.get(key)
        if isinstance(value, dict) and isinstance(old, dict):
            _merge(value, old, path)
        elif isinstance(old, dict) and not isinstance(value, dict):
            raise ConfigError(f"{path}: {key} holds keys in the base config, but is {value!r} here")
        else:
            into[key] = value


def _line(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    return "" if mark is None else f"line {mark.line + 1}: "


def _problem(error: yaml.YAMLError) -> str:
    return str(getattr(error, "problem", None) or error).splitlines()[0]
