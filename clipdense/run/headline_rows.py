"""The table of published results: what each needs, and what it should give."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from clipdense.engine.options import ConfigError
from clipdense.run.config_file import load_yaml

__all__ = ["EVIDENCE", "Data", "Row", "Value", "WeightFile", "read_rows", "select_rows"]

EVIDENCE = {
    "R": "read in the repository's table",
    "P": "seen in the paper or in a later paper's table",
    "I": "stated in an issue of the repository",
    "M": "quoted from memory, not verified",
}
"""Mark of a published value -> where it comes from."""

_T = TypeVar("_T")


@dataclass(frozen=True)
class WeightFile:
    """Published weights.

    Attributes:
        name: name in the table.
        page: web page on which they are published.
        file: published name of the file; None if it is not known.
        url: address of the file; None if the page has to be visited.
        sha256: checksum; None if it is not known.
        megabytes: size; None if it is not known.
        licence: licence of the weights.
        pickle: whether the file may need `--allow-pickle`.
        into: config key of the converted file.
        options: config keys for the converter, see `convert_weights`.
    """

    name: str
    page: str
    licence: str
    file: str | None = None
    url: str | None = None
    sha256: str | None = None
    megabytes: float | None = None
    pickle: bool = False
    into: str = "MODEL.WEIGHTS"
    options: dict[str, Any] | None = None

    @property
    def local_name(self) -> str:
        """Name of the file in the folder of `clipdense reproduce`."""
        return self.file or f"{self.name}.pth"


@dataclass(frozen=True)
class Data:
    """Data of a row.

    Attributes:
        name: name in the table.
        needs: what to download, and the scripts that prepare it.
        paths: what is there afterwards, below the folder of datasets.
        gigabytes: size of the downloads; None if it is not known.
    """

    name: str
    needs: str
    paths: Sequence[str]
    gigabytes: float | None = None


@dataclass(frozen=True)
class Value:
    """A published value.

    Attributes:
        metric: key in ``results.json``.
        paper: the published value.
        tolerance: largest difference that counts as reproduced.
        evidence: key of `EVIDENCE`.
    """

    metric: str
    paper: float
    tolerance: float
    evidence: str


@dataclass(frozen=True)
class Row:
    """A published result.

    Attributes:
        name: name of the row.
        system: name of the method.
        values: published values.
        data: its data; None only if the row is not run.
        config: path of the config, from the root of the repository; "" only if the row is not run.
        weights: the published file; None for methods without training.
        clip: "model:tag" of a CLIP that open_clip downloads; None if the weights are complete.
        protocol: method and benchmark of a training-free method, whose published settings are used.
        options: config key -> value.
        note: a known difference from the published setting.
        not_run: why the row is listed only; "" for a row that is evaluated.
    """

    name: str
    system: str
    values: Sequence[Value]
    data: Data | None = None
    config: str = ""
    weights: WeightFile | None = None
    clip: str | None = None
    protocol: Sequence[str] = ()
    options: dict[str, Any] | None = None
    note: str = ""
    not_run: str = ""


def read_rows(path: Path) -> list[Row]:
    """Read a table of published results.

    Raises:
        ConfigError: If the file cannot be read, or an entry is unknown, missing or of the wrong type.
    """
    content = load_yaml(path)
    if not isinstance(content, dict) or not isinstance(content.get("rows"), list):
        raise ConfigError(f"{path}: expected the entries data, weights and rows")
    data = {n: _make(Data, {"name": n, **_dict(e, path)}, path) for n, e in _part(content, "data", path)}
    weights = {
        n: _make(WeightFile, {"name": n, **_dict(e, path)}, path) for n, e in _part(content, "weights", path)
    }
    rows: list[Row] = []
    for entry in content["rows"]:
        entry = dict(_dict(entry, path))
        where = f"{path}: row {entry.get('name')}"
        for key, known in (("data", data), ("weights", weights)):
            if key in entry and entry[key] not in known:
                raise ConfigError(f"{where}: {key} {entry[key]!r} is not listed under {key}")
            if key in entry:
                entry[key] = known[entry[key]]
        values = entry.get("values")
        if not isinstance(values, list) or not values:
            raise ConfigError(f"{where}: values is empty; list a metric, the published value and a tolerance")
        entry["values"] = [_make(Value, _dict(value, path), path) for value in values]
        if marks := [v.evidence for v in entry["values"] if v.evidence not in EVIDENCE]:
            raise ConfigError(f"{where}: evidence {marks[0]!r}; expected one of {', '.join(EVIDENCE)}")
        row = _make(Row, entry, path)
        if not row.not_run and (row.data is None or not row.config):
            raise ConfigError(f"{where}: a row needs data and config, or not_run with the reason")
        rows.append(row)
    names = [row.name for row in rows]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"{path}: two rows are called {twice[0]}")
    if odd := [name for name in (*names, *weights) if not re.fullmatch(r"[\w.-]+", name)]:
        raise ConfigError(f"{path}: {odd[0]!r} cannot be the name of a folder")
    return rows


def select_rows(rows: Sequence[Row], names: Sequence[str]) -> list[Row]:
    """Return the rows of these names, or of the systems of these names; all rows if there are no names.

    Raises:
        ConfigError: If a name is unknown; the message has similar names.
    """
    if not names:
        return list(rows)
    selected: list[Row] = []
    for name in names:
        found = [row for row in rows if name == row.name or name.lower() == row.system.lower()]
        if not found:
            known = [row.name for row in rows] + sorted({row.system for row in rows})
            near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            raise ConfigError(f"there is no row or system {name!r}{hint} (--dry-run lists all)")
        selected += [row for row in found if row not in selected]
    return selected


def _part(content: dict[str, Any], key: str, path: Path) -> list[tuple[str, Any]]:
    return list(_dict(content.get(key) or {}, path).items())


def _dict(entry: Any, path: Path) -> dict[str, Any]:
    if not isinstance(entry, dict):
        raise ConfigError(f"{path}: expected keys and values, not {str(entry)[:60]!r}")
    return entry


def _make(kind: type[_T], entry: dict[str, Any], path: Path) -> _T:
    """Make a part of the table; an unknown or missing key is an error."""
    where = f"{path}: {kind.__name__} {entry.get('name', entry.get('metric', ''))}"
    if unknown := entry.keys() - {field.name for field in fields(kind)}:  # type: ignore[arg-type]
        raise ConfigError(f"{where}: unknown key {min(unknown)}")
    try:
        return kind(**entry)
    except TypeError as error:
        raise ConfigError(f"{where}: {str(error).partition('() ')[2]}") from error
