"""Tables of training-free methods: which methods, on which CLIPs and datasets, with which settings.

A table file (YAML)::

    title: Methods on shapes
    config: configs/shapes/Base-ZeroShot.yaml
    towers: [shapes-vit, shapes-eva]      # open_clip models, NAME or NAME:WEIGHTS, or CLIPs of this package
    benchmarks: [voc21, context59]        # with published settings; left out: the datasets of the config
    images: 100                           # the first images of each dataset only; left out: all
    overrides: {MODEL.DEVICE: cuda}       # for every method; over the published settings
    methods:
      - sclip
      - name: naclip with PAMR
        method: naclip
        overrides: {MODEL.ZERO_SHOT.PAMR_STEPS: 10}
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from clipdense.systems.training_free.methods import METHODS
from clipdense.systems.training_free.protocols import DATASETS, protocol_overrides

__all__ = ["Sweep", "Variant", "load_sweep"]


@dataclass(frozen=True)
class Variant:
    """A method with settings, one row of a table.

    Attributes:
        name: in the table.
        method: name in `METHODS`.
        overrides: config key -> value.
    """

    name: str
    method: str
    overrides: Mapping[str, Any] = field(default_factory=dict)

    def config_overrides(self, benchmark: str = "", common: Mapping[str, Any] | None = None) -> list[str]:
        """Return KEY VALUE in turn; later ones win.

        Args:
            benchmark: its published settings come first; "": those of the config.
            common: the overrides of all methods, which come before the variant's own.
        """
        if benchmark:
            published = protocol_overrides(self.method, benchmark)
        else:
            published = ["MODEL.ZERO_SHOT.METHOD", self.method]
        own = [entry for pair in {**(common or {}), **self.overrides}.items() for entry in pair]
        return [str(entry) for entry in (*published, *own)]


@dataclass(frozen=True)
class Sweep:
    """Content of a table file; see the module."""

    towers: Sequence[str]
    variants: Sequence[Variant]
    config: str = "projects/ZeroShot/configs/Base-ZeroShot.yaml"
    benchmarks: Sequence[str] = ()
    images: int = 0
    overrides: Mapping[str, Any] = field(default_factory=dict)
    title: str = ""

    def __post_init__(self) -> None:
        names = [variant.name for variant in self.variants]
        if len(set(names)) < len(names):
            raise ValueError(f"two methods have one name: {', '.join(names)}; give each a name of its own")
        _check_known("method", [variant.method for variant in self.variants], METHODS)
        _check_known("benchmark", self.benchmarks, DATASETS)


def _check_known(what: str, names: Sequence[str], known: Collection[str]) -> None:
    for name in names:
        if name not in known:
            raise ValueError(f"unknown {what} {name!r}; known: {', '.join(known)}")


def load_sweep(path: str | os.PathLike[str]) -> Sweep:
    """Load a table file.

    Raises:
        ValueError: If the file has another structure, or names an unknown key, method or benchmark; names it.
    """
    content = yaml.safe_load(Path(path).read_text())
    known = ("title", "config", "towers", "benchmarks", "images", "overrides", "methods")
    if not isinstance(content, dict) or not content.get("towers") or not content.get("methods"):
        raise ValueError(f"{path}: expected a mapping with 'towers' and 'methods'")
    if unknown := sorted(set(content) - set(known)):
        raise ValueError(f"{path}: unknown keys {', '.join(unknown)}; known: {', '.join(known)}")
    variants = [_variant(entry, path) for entry in content.pop("methods")]
    try:
        return Sweep(variants=variants, **content)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _variant(entry: Any, path: str | os.PathLike[str]) -> Variant:
    if isinstance(entry, str):
        return Variant(entry, entry)
    fields = {"name", "method", "overrides"}
    if not isinstance(entry, dict) or not {"name", "method"} <= set(entry) <= fields:
        raise ValueError(f"{path}: a method is a name, or a mapping of name, method and overrides: {entry}")
    return Variant(**entry)
