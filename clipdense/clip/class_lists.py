"""Reading of class-list files: text, CSV and JSON, as people and other projects write them."""

from __future__ import annotations

import codecs
import csv
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["class_list_path", "read_class_list"]

_ENDINGS = (".txt", ".json", ".csv", ".names", ".tsv", ".lst")
_NAME_COLUMNS = {"name", "names", "class", "class_name", "label", "category"}
_NUMBERED = re.compile(r"\s*(\d+)\s*[:\t]\s*(\S.*)")  # OpenSeg's "1:person,child"
_COUNTED = re.compile(r"\s*(\d+)[.)]?\s+(\S.*)")  # "0 person", "1. person"


def class_list_path(source: str | Path) -> Path | None:
    """Return the path of a class-list file, with ``~`` and variables expanded; None for a list of names.

    Args:
        source: a path object, the name of an existing file, or a text with the ending of a list (.txt, .json,
            .csv, .names, .tsv, .lst in any case), whether or not the file exists.
    """
    path = os.path.expanduser(os.path.expandvars(os.fspath(source)))
    if isinstance(source, Path) or os.path.isfile(path) or path.lower().endswith(_ENDINGS):
        return Path(path)
    return None


def read_class_list(path: Path) -> Any:
    """Read a class-list file by its ending; one that is neither .json nor .csv holds one class per line.

    A byte order mark is removed. If all lines are numbered ("1:person"), the numbers give the order and are
    removed. A .csv file has a class per row (a column called name, the column beside the numbers, or all
    cells as synonyms), or all classes in one row.

    Returns:
        The decoded JSON content, or a list with the names of each class: one text, or a list of synonyms.

    Raises:
        ValueError: If the file is not text, is not JSON, or numbers only some of its lines.
    """
    text = _decode(path.read_bytes())
    suffix = path.suffix.lower()
    if suffix == ".json":
        try:
            return json.loads(text)
        except RecursionError:
            raise ValueError("it is nested too deeply") from None
    lines = [line for line in text.splitlines() if line.strip()]
    if suffix in (".csv", ".tsv"):
        return _csv_classes(lines, "\t" if suffix == ".tsv" else ",")
    return _without_numbers(lines)


def _decode(content: bytes) -> str:
    wide = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = content.decode("utf-16" if wide else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"not a text file in UTF-8 (byte {error.start}); save it as UTF-8") from None
    if "\0" in text:
        raise ValueError("not a text file")
    return text


def _without_numbers(lines: Sequence[str]) -> list[str]:
    """Remove the numbers in front of all lines and sort by them; lines without numbers stay as they are."""
    numbered = [_NUMBERED.fullmatch(line) for line in lines]
    if any(numbered) and not all(numbered):
        at = next(i for i, found in enumerate(numbered) if not found)
        raise ValueError(f"some lines begin with a number and a colon, but not {lines[at].strip()!r}")
    if not any(numbered):
        numbered = [_COUNTED.fullmatch(line) for line in lines]
        numbers = [int(found[1]) for found in numbered if found]
        if len(lines) < 2 or numbers not in (list(range(len(lines))), list(range(1, len(lines) + 1))):
            return list(lines)
    pairs = [(int(found[1]), found[2]) for found in numbered if found]
    if len({number for number, _ in pairs}) < len(pairs):
        raise ValueError("two lines have the same number")
    return [name for _, name in sorted(pairs)]


def _csv_classes(lines: Sequence[str], separator: str) -> list[str | list[str]]:
    rows = [[cell.strip() for cell in row] for row in csv.reader(lines, delimiter=separator)]
    if len(rows) == 1:
        return [[cell] for cell in rows[0] if cell]
    header = [cell.lower() for cell in rows[0]] if rows else []
    columns = [i for i, cell in enumerate(header) if cell in _NAME_COLUMNS]
    if columns:
        return [[row[columns[0]]] for row in rows[1:] if len(row) > columns[0]]
    if rows and all(len(row) == 2 for row in rows):
        for number, name in ((0, 1), (1, 0)):
            if all(row[number].isdigit() for row in rows):
                return [[row[name]] for row in sorted(rows, key=lambda row: int(row[number]))]
    return [[cell for cell in row if cell] for row in rows]
