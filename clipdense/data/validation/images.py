"""Checks of image files and label maps that need no decoding of pixels, or as little as possible."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from clipdense.data.image import MAX_PIXELS, header_size, read_labels
from clipdense.data.validation.report import Report

__all__ = ["check_image_files", "check_label_maps", "header_size"]


def check_image_files(records: Iterable[Mapping[str, Any]], report: Report, *, headers: int = 500) -> None:
    """Check that the image of every record is there, and that evenly chosen headers have the stated size.

    Args:
        records: Detectron2's dataset dicts, with ``file_name`` and, optionally, ``height`` and ``width``.
        report: what is found is added to it, and the stamps of the opened files and of the folders.
        headers: number of files to open; -1 for all.
    """
    records = list(records)
    for folder in {str(Path(record["file_name"]).parent) for record in records}:
        report.stamp(folder)
    step = 1 if headers < 0 else max(1, len(records) // max(1, headers))
    for index, record in enumerate(records):
        path = Path(record["file_name"])
        if not path.is_file():
            report.add("error", "images that are not there", str(path), "Check the image folder.")
        elif index % step == 0:
            report.stamp(path)
            _check_header(path, record, report)


def _check_header(path: Path, record: Mapping[str, Any], report: Report) -> None:
    size = header_size(path)
    if size is None:
        report.add(
            "error", "files that are not images", str(path), "Replace the file, or remove it from the data."
        )
        return
    if size[0] * size[1] > MAX_PIXELS:
        report.add(
            "note",
            f"images of more than {MAX_PIXELS} pixels",
            f"{path} is {size[0]} x {size[1]}",
            "They are refused unless INPUT.MAX_PIXELS is larger.",
        )
    stated = (record.get("height"), record.get("width"))
    if None in stated or stated == size:
        return
    if stated == size[::-1]:
        report.add(
            "note",
            "images whose annotations ignore the EXIF orientation",
            str(path),
            "They are read without it, as their stated size says (INPUT.EXIF_ORIENTATION).",
        )
        return
    report.add(
        "error",
        "images of another size than stated",
        f"{path} is {size[0]} x {size[1]}, stated {stated[0]} x {stated[1]} (height x width)",
        "Correct the stated size, or give the images that were annotated.",
    )


def check_label_maps(
    records: Iterable[Mapping[str, Any]],
    report: Report,
    *,
    num_classes: int,
    ignore: Collection[int] = (255,),
    maps: int = 100,
) -> None:
    """Check evenly chosen label maps: there, of their image's size, with values of known classes.

    Args:
        records: dataset dicts with ``sem_seg_file_name``.
        report: what is found is added to it, and the stamps of the decoded maps.
        num_classes: number of classes; values are 0 .. num_classes - 1.
        ignore: values that stand for no class.
        maps: number of label maps to decode; -1 for all.
    """
    records = [record for record in records if "sem_seg_file_name" in record]
    step = 1 if maps < 0 else max(1, len(records) // max(1, maps))
    allowed = {*range(num_classes), *ignore}
    for index, record in enumerate(records):
        path = Path(record["sem_seg_file_name"])
        if not path.is_file():
            report.add("error", "label maps that are not there", str(path), "Check the folder of label maps.")
            continue
        if index % step:
            continue
        report.stamp(path)
        try:
            labels = read_labels(path)
        except OSError as error:
            report.add("error", "label maps that are not images", str(error), "Replace the file.")
            continue
        size = header_size(record["file_name"])
        if size is not None and labels.shape not in (size, header_size(record["file_name"], "ignore")):
            report.add(
                "error",
                "label maps of another size than their image",
                f"{path} is {labels.shape[0]} x {labels.shape[1]}, the image {size[0]} x {size[1]}",
                "Resize neither: give the label map that belongs to the image.",
            )
        unknown = sorted(set(np.unique(labels).tolist()) - allowed)
        if unknown:
            report.add(
                "error",
                "label maps with values that are no class",
                f"{path}: {', '.join(map(str, unknown[:5]))}",
                f"Expected 0 to {num_classes - 1}, or {', '.join(map(str, sorted(ignore)))} for no class.",
            )
