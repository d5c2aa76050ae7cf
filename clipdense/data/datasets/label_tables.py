"""Class names of label maps, with the colours of maps that are stored as pictures."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from clipdense.clip.vocabulary import Vocabulary
from clipdense.data.image import read_image, read_labels
from clipdense.data.json_files import load_json
from clipdense.data.validation.report import DataError
from clipdense.files import read_text

__all__ = ["UNKNOWN", "ClassTable", "read_class_table"]

UNKNOWN = -1
"""Label of a pixel whose colour is no class's."""

_COLOUR_FIRST = re.compile(r"(\d{1,3})[\s,]+(\d{1,3})[\s,]+(\d{1,3})[\s,]+(\S.*)")
_NAME_FIRST = re.compile(r"(\S.*?)\s*[:,]\s*(\d{1,3})\s*,\s*(\d{1,3})\s*,\s*(\d{1,3})\s*(?::.*)?")

Labels = npt.NDArray[np.int64]


@dataclass(frozen=True)
class ClassTable:
    """Names of the classes in order; with colours, a label map is a picture in these colours.

    Attributes:
        names: of the classes.
        colours: (R, G, B) of each class, 0 to 255; None if a label map holds the numbers of the classes.
    """

    names: tuple[str, ...]
    colours: tuple[tuple[int, int, int], ...] | None = None

    def read(self, path: Path) -> Labels:
        """Read a label map (H, W): indices of classes; with colours, `UNKNOWN` for any other colour.

        Raises:
            FileNotFoundError: If the file does not exist.
            BadImageError: If it cannot be decoded.
        """
        if self.colours is None:
            return read_labels(path)
        pixels = read_image(path, "RGB", orientation="ignore").astype(np.int64)
        values, where = np.unique(_code(pixels), return_inverse=True)
        known = {int(_code(np.array(colour))): k for k, colour in enumerate(self.colours)}
        table = np.array([known.get(int(value), UNKNOWN) for value in values], np.int64)
        return table[where].reshape(pixels.shape[:2])


def _code(colours: npt.NDArray[Any]) -> Any:
    return colours[..., 0] * 65536 + colours[..., 1] * 256 + colours[..., 2]


def read_class_table(path: Path) -> ClassTable:
    """Read class names, and colours if the file has them.

    Files with colours: lines ``R G B name`` (CamVid), ``name,R,G,B`` (CSV) or ``name:R,G,B::`` (CVAT's
    ``labelmap.txt``), or a JSON object name -> [R, G, B]. Any other file is a list of names, see
    `Vocabulary.from_file`.

    Raises:
        FileNotFoundError: If there is no such file.
        DataError: If only some lines have a colour, or two classes have the same; names the line.
        ValueError: If the file has no class names.
    """
    rows: list[tuple[str, tuple[int, ...]]] = []
    if path.suffix == ".json":
        content = load_json(path)
        if isinstance(content, dict) and content and all(_is_colour(v) for v in content.values()):
            rows = [(name, tuple(colour)) for name, colour in content.items()]
    elif path.is_file():
        rows = _lines(path)
    if not rows:
        return ClassTable(Vocabulary.from_file(path, separator=None).names)
    seen: dict[tuple[int, ...], str] = {}
    for name, colour in rows:
        if not _is_colour(list(colour)):
            raise DataError(f"{path}: {name} has the colour {colour}; expected three numbers from 0 to 255")
        if colour in seen:
            raise DataError(f"{path}: {seen[colour]} and {name} have one colour {colour}; give each its own")
        seen[colour] = name
    names = Vocabulary.from_names([name for name, _ in rows], separator=None).names
    return ClassTable(tuple(names), tuple((c[0], c[1], c[2]) for _, c in rows))


def _is_colour(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(v in range(256) for v in value)


def _lines(path: Path) -> list[tuple[str, tuple[int, ...]]]:
    """Return name and colour of each line; empty if no line has a colour."""
    lines = [(k, text.strip()) for k, text in enumerate(read_text(path).splitlines(), 1)]
    lines = [(k, text) for k, text in lines if text and not text.startswith("#")]
    rows, without = [], []
    for k, text in lines:
        if found := _COLOUR_FIRST.fullmatch(text):
            rows.append((found[4].strip(), tuple(int(found[i]) for i in (1, 2, 3))))
        elif found := _NAME_FIRST.fullmatch(text):
            rows.append((found[1].strip(), tuple(int(found[i]) for i in (2, 3, 4))))
        else:
            without.append((k, text))
    if rows and [text for _, text in without] not in ([], [lines[0][1]]):  # the first line may be a header
        k, text = without[-1]
        raise DataError(f"{path}:{k}: {text!r} has no colour, but other lines have one; give each R, G and B")
    return rows
