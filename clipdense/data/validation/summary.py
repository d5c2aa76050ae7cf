"""Counts of a dataset, and annotations that are allowed but suspicious."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from clipdense.clip.vocabulary import canonical
from clipdense.data.image import header_size, read_labels
from clipdense.data.validation.report import Report

from detectron2.structures import Boxes, BoxMode, pairwise_iou

__all__ = ["Summary", "summarise"]

Record = Mapping[str, Any]

_TINY = 3.0
"""Pixels; a box with a shorter side is hardly visible."""
_WHOLE, _SAME, _ELONGATED, _FEW, _VOID = 0.95, 0.95, 30.0, 5, 0.5


@dataclass
class Summary:
    """Counts of a dataset.

    Attributes:
        images: number of images.
        unit: what is counted by class: "objects", "segments" or "pixels"; "" for images alone.
        classes: name -> (number of units, number of images with the class), in the order of the dataset.
        short_sides: shorter side of each image, in pixels.
        long_sides: longer side of each image, in pixels.
        per_image: number of objects or segments in each image.
    """

    images: int
    unit: str = ""
    classes: dict[str, tuple[int, int]] = field(default_factory=dict)
    short_sides: list[int] = field(default_factory=list)
    long_sides: list[int] = field(default_factory=list)
    per_image: list[int] = field(default_factory=list)

    def lines(self) -> list[str]:
        """Format the counts for a terminal."""
        lines = []
        if self.short_sides:
            lines.append(
                f"  image sides: {min(self.short_sides)} to {max(self.long_sides)} pixels, "
                f"median {int(np.median(self.short_sides))} x {int(np.median(self.long_sides))}"
            )
        if self.per_image:
            lines.append(
                f"  {self.unit} in an image: {min(self.per_image)} to {max(self.per_image)}, "
                f"median {np.median(self.per_image):g}; {self.per_image.count(0)} images without"
            )
        total = sum(units for units, _ in self.classes.values())
        width = max(map(len, self.classes), default=0)
        for name, (units, images) in self.classes.items():
            share = f"{100 * units / total:5.1f} %" if total else "  0.0 %"
            count = "" if self.unit == "pixels" else f"{units:8d} {self.unit}, "
            lines.append(f"    {name.ljust(width)}  {count}{share}, in {images} images")
        return lines


def summarise(
    records: Sequence[Record], metadata: Mapping[str, Any], report: Report, *, limit: int = 500
) -> Summary:
    """Count the classes and sizes of a dataset, and note suspicious annotations.

    Suspicious are objects of less than 3 pixels, boxes of nearly the whole image, very elongated ones, two
    objects of one class in one place, classes that are rare or missing, names that differ by case alone,
    label maps that are mostly unlabelled, and equal image files.

    Args:
        records: Detectron2's dataset dicts.
        metadata: of the dataset, with its class names.
        report: notes are added to it.
        limit: number of images whose headers and label maps are read, evenly chosen; negative for all.
    """
    step = 1 if limit < 0 else max(1, -(-len(records) // limit))
    chosen = records[::step]
    summary = Summary(len(records))
    for record in chosen:
        stated = "height" in record and "width" in record
        size: tuple[int, int] | None = (
            (record["height"], record["width"]) if stated else header_size(record["file_name"])
        )
        if size is not None:
            summary.short_sides.append(min(size))
            summary.long_sides.append(max(size))
    units: Counter[int] = Counter()
    images: Counter[int] = Counter()
    names: list[str] = list(metadata.get("thing_classes") or metadata.get("stuff_classes") or ())
    first = records[0] if records else {}
    if "annotations" in first:
        summary.unit = "objects"
        for record in records:
            _count(record["annotations"], units, images, summary)
            _note_objects(record, names, report)
    elif "segments_info" in first:
        summary.unit = "segments"
        for record in records:
            _count(record["segments_info"], units, images, summary)
    elif "sem_seg_file_name" in first:
        summary.unit, names = "pixels", list(metadata["stuff_classes"])
        for record in chosen:
            _count_pixels(record, metadata.get("ignore_label", 255), units, images, report)
    if summary.unit:
        summary.classes = _by_name(names, units, images)
        _note_classes(names, units, images, step > 1 and summary.unit == "pixels", report)
    _note_equal_files([Path(record["file_name"]) for record in records], report)
    return summary


def _count(
    rows: Sequence[Mapping[str, Any]], units: Counter[int], images: Counter[int], summary: Summary
) -> None:
    found = [row["category_id"] for row in rows]
    units.update(found)
    images.update(set(found))
    summary.per_image.append(len(found))


def _by_name(names: Sequence[str], units: Counter[int], images: Counter[int]) -> dict[str, tuple[int, int]]:
    """Return the counts by class name; classes of one name get their numbers."""
    twice = {name for name, count in Counter(names).items() if count > 1}
    return {f"{name} ({k})" if name in twice else name: (units[k], images[k]) for k, name in enumerate(names)}


def _count_pixels(
    record: Record, ignore: int, units: Counter[int], images: Counter[int], report: Report
) -> None:
    values, counts = np.unique(read_labels(record["sem_seg_file_name"]), return_counts=True)
    found = dict(zip(values.tolist(), counts.tolist(), strict=True))
    void = found.pop(ignore, 0)
    units.update(found)
    images.update(found.keys())
    if void > _VOID * (void + sum(found.values())):
        share = 100 * void / (void + sum(found.values()))
        report.add(
            "note",
            "label maps that are mostly unlabelled",
            f"{record['sem_seg_file_name']}: {share:.0f} % of the pixels",
            "Check the ignored value, and whether 0 is a class.",
        )


def _note_objects(record: Record, names: Sequence[str], report: Report) -> None:
    """Note the suspicious objects of an image."""
    by_class: dict[int, list[list[float]]] = defaultdict(list)
    height, width = record.get("height", 0), record.get("width", 0)
    for row in record["annotations"]:
        box = BoxMode.convert(list(row["bbox"]), row["bbox_mode"], BoxMode.XYXY_ABS)
        w, h = box[2] - box[0], box[3] - box[1]
        if w <= 0 or h <= 0 or row.get("iscrowd", 0):
            continue
        by_class[row["category_id"]].append(box)
        place = f"{record['file_name']}: {names[row['category_id']]}, {w:.0f} x {h:.0f} pixels"
        if min(w, h) < _TINY:
            report.add("note", f"boxes with a side below {_TINY:g} pixels", place, "Check the annotation.")
        elif max(w, h) > _ELONGATED * min(w, h):
            report.add("note", f"boxes over {_ELONGATED:g} times as long as wide", place, "Check them.")
        if height and width and w * h > _WHOLE * height * width:
            report.add("note", "boxes of nearly the whole image", place, "Check that it is one object.")
    for category, boxes in by_class.items():
        if len(boxes) < 2:
            continue
        iou = pairwise_iou(Boxes(boxes), Boxes(boxes)).triu(1)
        for _ in range(int((iou > _SAME).sum())):
            report.add(
                "note",
                "two objects of one class in one place",
                f"{record['file_name']}: {names[category]}",
                "Remove one if it was labelled twice.",
            )


def _note_classes(
    names: Sequence[str], units: Counter[int], images: Counter[int], sampled: bool, report: Report
) -> None:
    """Note classes that are missing or rare, and names that are nearly equal."""
    for k, name in enumerate(names):
        if not units[k]:
            remedy = "They cannot be learned or measured here."
            report.add("note", "classes that never occur", name, "" if sampled else remedy)
        elif images[k] < _FEW and not sampled:
            report.add(
                "note",
                f"classes in fewer than {_FEW} images",
                f"{name} ({images[k]})",
                "Add some if you can.",
            )
    seen: dict[str, str] = {}
    for name in names:
        key = canonical(name)
        if key in seen and seen[key] != name:
            report.add(
                "note",
                "class names that are nearly equal",
                f"{seen[key]!r}, {name!r}",
                "Merge them if equal.",
            )
        seen.setdefault(key, name)


def _note_equal_files(paths: Sequence[Path], report: Report) -> None:
    """Note image files with the same content; only files of one size are read."""
    by_size: dict[int, list[Path]] = defaultdict(list)
    for path in dict.fromkeys(paths):
        if path.is_file():
            by_size[path.stat().st_size].append(path)
    for same in by_size.values():
        first: dict[bytes, Path] = {}
        for path in same if len(same) > 1 else ():
            digest = hashlib.sha256(path.read_bytes()).digest()
            if digest in first:
                report.add(
                    "note",
                    "equal image files",
                    f"{first[digest]} and {path}",
                    "Keep one, above all if they are in training and validation.",
                )
            first.setdefault(digest, path)
