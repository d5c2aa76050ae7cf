"""Files that cover all images of a run, written from rows of single images without holding them all."""

from __future__ import annotations

import csv
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask as mask_util

from clipdense.data.parquet import write_rows
from clipdense.files import atomic_path, json_text, write_text
from clipdense.run.image_files import ImageRows, rgb
from clipdense.visualization.pictures import draw_legend, save_picture

__all__ = ["write_summaries"]

_GROUP = 1024
"""Images whose masks are one row group of masks.parquet."""

_COLUMNS = {
    "image_id": "int64",
    "file_name": "string",
    "height": "int32",
    "width": "int32",
    "kind": "string",
    "category_id": "int32",
    "category": "string",
    "score": "float",
    "bbox": "list<double>",
    "area": "int64",
    "counts": "string",
}


def write_summaries(
    new_file: Callable[[str], Path],
    formats: Collection[str],
    names: Sequence[str],
    rows: Callable[[], Iterable[ImageRows]],
    failed: Callable[[], Iterable[Mapping[str, str]]],
    frames: Iterable[tuple[Any, ...]] = (),
) -> None:
    """Write results.json, panoptic.json, masks.parquet, the classes and summary.csv.

    Args:
        new_file: from the name of a file to its path.
        formats: keys of `clipdense.run.outputs.FORMATS`.
        names: class names.
        rows: returns an iterator over the rows of the images; it is called several times.
        failed: returns an iterator over images that failed, ``file_name`` and ``reason``.
        frames: further rows of summary.csv.
    """
    categories = [{"id": i, "name": name} for i, name in enumerate(names)]
    images = (row["image"] for row in rows())
    if "coco" in formats:
        sections: dict[str, Iterable[Any]] = {"images": images, "categories": categories}
        sections |= {
            "annotations": _numbered(rows(), "annotations"),
            "segments": _numbered(rows(), "segments"),
        }
        _write_json(new_file("results.json"), sections | {"failed": failed()})
    if "panoptic" in formats:
        images = (row["image"] for row in rows())
        annotations = (row["panoptic"] for row in rows())
        content = {"images": images, "annotations": annotations, "categories": categories}
        _write_json(new_file("panoptic.json"), content)
    if "parquet" in formats:
        groups, columns = _mask_groups(rows()), dict(_COLUMNS)
        first = next(groups, [])
        if first and isinstance(first[0]["image_id"], str):
            columns["image_id"] = "string"
        write_rows(new_file("masks.parquet"), chain([first], groups), columns)
    if "labels" in formats:
        _write_legend(new_file, names)
    if {"yolo", "yolo-seg"} & set(formats):
        write_text(new_file("classes.txt"), "".join(f"{name}\n" for name in names))
    if "csv" in formats:
        header = ("image", "frame", "class", "number", "share", "best_score")
        lines = (line for row in rows() for line in row["summary"])
        _write_csv(new_file("summary.csv"), chain([header], lines, frames))


def _numbered(rows: Iterable[ImageRows], key: str) -> Iterator[dict[str, Any]]:
    """Yield annotations or segments with the number ``id``."""
    found = (entry for row in rows for entry in row[key])  # type: ignore[literal-required]
    for number, entry in enumerate(found):
        yield {"id": number, **entry}


def _write_json(path: Path, sections: Mapping[str, Iterable[Any]]) -> None:
    """Write an object of lists, with an entry of a list in each line."""
    with atomic_path(path) as part, part.open("w", encoding="utf-8") as file:
        for i, (name, entries) in enumerate(sections.items()):
            file.write(f'{"," if i else "{"}\n "{name}": [')
            for j, entry in enumerate(entries):
                file.write(f"{',' if j else ''}\n  {json_text(entry)}")
            file.write("]")
        file.write("\n}\n")


def _mask_groups(rows: Iterable[ImageRows]) -> Iterator[list[dict[str, Any]]]:
    """Yield the rows of masks.parquet, those of many images at a time."""
    group: list[dict[str, Any]] = []
    for count, row in enumerate(rows, 1):
        image = row["image"]
        for kind in ("annotations", "segments"):
            for entry in row[kind]:
                columns = {key: entry.get(key) for key in _COLUMNS}
                columns |= {"image_id": image["id"], "kind": kind.removesuffix("s")}
                columns |= {key: image[key] for key in ("file_name", "height", "width")}
                mask = entry.get("segmentation")
                if mask is not None:
                    columns["counts"] = mask["counts"]
                    columns["area"] = (
                        int(mask_util.area(mask)) if entry.get("area") is None else entry["area"]
                    )
                group.append(columns)
        if count % _GROUP == 0:
            yield group
            group = []
    yield group


def _write_legend(new_file: Callable[[str], Path], names: Sequence[str]) -> None:
    rows = [(i, name, f"#{bytes(rgb(i)).hex()}") for i, name in enumerate(names)]
    _write_csv(new_file("classes.csv"), [("value", "name", "color"), *rows])
    blank = np.full((1, 640, 3), 255, np.uint8)
    save_picture(draw_legend(blank, [(name, i) for i, name in enumerate(names)]), new_file("legend.png"))


def _write_csv(path: Path, rows: Iterable[tuple[Any, ...]]) -> None:
    with atomic_path(path) as part, part.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
