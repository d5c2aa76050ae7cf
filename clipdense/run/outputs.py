"""Folder of predictions in several formats."""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image

from clipdense.files import atomic_path, json_text, write_text
from clipdense.run.prediction import Prediction
from clipdense.visualization.curves import class_color
from clipdense.visualization.pictures import draw_legend, save_picture
from clipdense.visualization.segments import class_labels, to_array

__all__ = ["FORMATS", "OutputFolder", "retire_earlier_files"]

_LISTING = ".predictions"
"""File that lists what a run has written, so that the next run can move it away."""

FORMATS: dict[str, str] = {
    "pictures": "<image>.jpg: what was found, drawn on the image",
    "coco": "results.json: images, categories, annotations and segments, as in a COCO file",
    "labels": "labels/<image>.png: the class of each pixel, with a palette; 255 is no class; more than 255 "
    "classes need 16 bits, and no class is 65535; legend.png and classes.csv",
    "panoptic": "panoptic/<image>.png and panoptic.json, as COCO's panoptic files",
    "yolo": "yolo/<image>.txt: class, centre x, centre y, width, height, as shares of the image; classes.txt",
    "yolo-seg": "yolo/<image>.txt: class and the polygon of each object; classes.txt",
    "csv": "summary.csv: image, class, number, share of the area, best score",
}
"""Format -> its files."""


def retire_earlier_files(folder: Path) -> Path | None:
    """Move the files of an earlier run of predictions into a subfolder ``old_1``, ``old_2``, ...

    Files that no run has listed stay where they are.

    Returns:
        The subfolder; None if there was nothing to move.
    """
    listing = folder / _LISTING
    if not listing.is_file():
        return None
    names = [
        name for name in dict.fromkeys(listing.read_text("utf-8").splitlines()) if (folder / name).is_file()
    ]
    listing.unlink()
    if not names:
        return None
    number = 1
    while (folder / f"old_{number}").exists():
        number += 1
    target = folder / f"old_{number}"
    for name in names:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).rename(target / name)
    return target


class OutputFolder:
    """Folder that gets predictions in some formats; a context manager, which writes the summaries at its end.

    Files of an earlier run are moved away first (`retire_earlier_files`), so that runs never mix.

    Args:
        folder: is created if it does not exist.
        metadata: class names of the model.
        formats: keys of `FORMATS`.
        inputs: images that are read; no file is written in place of one.
        failed: input -> why it failed; may grow until the end.

    Attributes:
        path: the folder.
        retired: where the files of an earlier run are; None if there were none.

    Raises:
        ValueError: If a format is unknown.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        metadata: Any,
        formats: Collection[str] = ("pictures", "coco"),
        *,
        inputs: Iterable[Path] = (),
        failed: dict[str, str] | None = None,
    ) -> None:
        if unknown := sorted(set(formats) - FORMATS.keys()):
            raise ValueError(f"unknown format {', '.join(unknown)}; known: {', '.join(FORMATS)}")
        self.path, self.formats = Path(folder), tuple(formats)
        self.failed = {} if failed is None else failed
        self._metadata = metadata
        self.path.mkdir(parents=True, exist_ok=True)
        self.retired = retire_earlier_files(self.path)
        own = self.path.resolve()
        self._used = {image.name.lower() for image in inputs if image.resolve().parent == own}
        self._stems: set[str] = set()
        self.images: list[dict[str, Any]] = []
        self.annotations: list[dict[str, Any]] = []
        self.segments: list[dict[str, Any]] = []
        self._panoptic: list[dict[str, Any]] = []
        self._summary: list[tuple[Any, ...]] = []

    def __enter__(self) -> OutputFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def add(self, prediction: Prediction) -> Path | None:
        """Write the files of one image; return its picture, if pictures are written."""
        stem = Path(prediction.source).stem or "image"
        picture = self.take(stem) if "pictures" in self.formats else None
        if picture is not None:
            prediction.save_picture(picture)
        name = picture.stem if picture is not None else self._unused(stem)
        number = len(self.images)
        height, width = prediction.image.shape[:2]
        entry = {"id": number, "file_name": prediction.source, "height": height, "width": width}
        self.images.append(entry | ({} if picture is None else {"picture": picture.name}))
        for row in prediction.segments(number):
            self.segments.append({"id": len(self.segments), **row})
        for row in prediction.annotations(number):
            self.annotations.append({"id": len(self.annotations), **row})
        writers: dict[str, Callable[[Prediction, str], None]] = {
            "labels": self._labels,
            "panoptic": self._segment_ids,
            "yolo": self._yolo,
            "yolo-seg": self._yolo,
            "csv": lambda prediction, _: self.summarize(prediction),
        }
        for format in self.formats:
            if format in writers:
                writers[format](prediction, name)
        return picture

    def take(self, stem: str, suffix: str = ".jpg") -> Path:
        """Return a new file named after ``stem``, with a number if the name is in use."""
        stem = re.sub(r'[\s/\\:*?"<>|]+', "_", stem)
        number, name = 1, f"{stem}{suffix}"
        while name.lower() in self._used:
            number += 1
            name = f"{stem}_{number}{suffix}"
        self._used.add(name.lower())
        return self.new_file(name)

    def new_file(self, name: str) -> Path:
        """Return a file of the folder, and list it as written by this run."""
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with (self.path / _LISTING).open("a", encoding="utf-8") as listing:
            listing.write(f"{name}\n")
        return path

    def close(self) -> None:
        """Write what covers all images: results.json, panoptic.json, the classes and summary.csv."""
        names = self._metadata.get("thing_classes") or self._metadata.get("stuff_classes") or ()
        categories = [{"id": i, "name": name} for i, name in enumerate(names)]
        if "coco" in self.formats:
            failed = [{"file_name": name, "reason": why} for name, why in self.failed.items()]
            parts = {"annotations": self.annotations, "segments": self.segments, "failed": failed}
            content = {"images": self.images, "categories": categories, **parts}
            write_text(self.new_file("results.json"), json_text(content, indent=1) + "\n")
        if "panoptic" in self.formats:
            content = {"images": self.images, "annotations": self._panoptic, "categories": categories}
            write_text(self.new_file("panoptic.json"), json_text(content) + "\n")
        if "labels" in self.formats:
            self._legend(list(names))
        if {"yolo", "yolo-seg"} & set(self.formats):
            write_text(self.new_file("classes.txt"), "".join(f"{name}\n" for name in names))
        if "csv" in self.formats:
            header = ("image", "frame", "class", "number", "share", "best_score")
            self._table("summary.csv", [header, *self._summary])

    def _unused(self, stem: str) -> str:
        """Return a stem that no other image of this run has."""
        stem = re.sub(r'[\s/\\:*?"<>|]+', "_", stem)
        number, name = 1, stem
        while name.lower() in self._stems:
            number += 1
            name = f"{stem}_{number}"
        self._stems.add(name.lower())
        return name

    def _labels(self, prediction: Prediction, stem: str) -> None:
        labels, wide = prediction.labels, len(prediction.names) > 255
        dtype, empty = (np.uint16, 65535) if wide else (np.uint8, 255)
        image = Image.fromarray(np.where(labels < 0, empty, labels).astype(dtype))
        if not wide:  # PNG has palettes for 8 bits only
            image.putpalette(palette(len(prediction.names)))
        with atomic_path(self.new_file(f"labels/{stem}.png")) as part:
            image.save(part, format="PNG")

    def _segment_ids(self, prediction: Prediction, stem: str) -> None:
        ids, segments = _panoptic_map(prediction)
        colors = np.stack([ids & 255, ids >> 8 & 255, ids >> 16 & 255], axis=-1).astype(np.uint8)
        with atomic_path(self.new_file(f"panoptic/{stem}.png")) as part:
            Image.fromarray(colors).save(part, format="PNG")
        number = len(self.images) - 1
        self._panoptic.append({"image_id": number, "file_name": f"{stem}.png", "segments_info": segments})

    def _yolo(self, prediction: Prediction, stem: str) -> None:
        found, (height, width) = prediction.objects, prediction.image.shape[:2]
        lines = []
        for i, (x0, y0, x1, y1) in enumerate(found.boxes.tolist()):
            shares = [(x0 + x1) / 2 / width, (y0 + y1) / 2 / height, (x1 - x0) / width, (y1 - y0) / height]
            if "yolo-seg" in self.formats and found.masks is not None:
                points = _outline(found.masks[i])
                shares = [
                    value / side
                    for point in points
                    for value, side in zip(point, (width, height), strict=True)
                ]
            if shares:
                lines.append(" ".join([str(found.classes[i]), *(f"{share:.6f}" for share in shares)]))
        write_text(self.new_file(f"yolo/{stem}.txt"), "".join(f"{line}\n" for line in lines))

    def summarize(self, prediction: Prediction) -> None:
        """Add the rows of one image or frame to summary.csv."""
        found, names = prediction.objects, prediction.names
        frame = "" if prediction.frame is None else prediction.frame
        for c in np.unique(found.classes).tolist():
            chosen = found.classes == c
            share = "" if found.masks is None else f"{found.masks[chosen].any(0).mean():.4f}"
            name = names[c] if c < len(names) else str(c)
            best = f"{found.scores[chosen].max():.3f}"
            self._summary.append((prediction.source, frame, name, int(chosen.sum()), share, best))

    def _legend(self, names: list[str]) -> None:
        colors = [_rgb(i) for i in range(len(names))]
        rows = [
            (i, name, f"#{bytes(color).hex()}")
            for i, (name, color) in enumerate(zip(names, colors, strict=True))
        ]
        self._table("classes.csv", [("value", "name", "color"), *rows])
        blank = np.full((1, 640, 3), 255, np.uint8)
        save_picture(
            draw_legend(blank, [(name, i) for i, name in enumerate(names)]), self.new_file("legend.png")
        )

    def _table(self, name: str, rows: Iterable[tuple[Any, ...]]) -> None:
        with atomic_path(self.new_file(name)) as part, part.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(rows)


def palette(num_classes: int) -> list[int]:
    """Return the palette of a label map, 256 RGB triples: the colours of the classes; white for no class."""
    colors = [_rgb(i) for i in range(min(num_classes, 255))]
    return [value for color in [*colors, *[(255, 255, 255)] * (256 - len(colors))] for value in color]


def _rgb(index: int) -> tuple[int, int, int]:
    red, green, blue = (round(255 * value) for value in class_color(index))
    return red, green, blue


def _panoptic_map(prediction: Prediction) -> tuple[npt.NDArray[np.int64], list[dict[str, Any]]]:
    """Return ids (H, W), 0 for no segment, and COCO's rows of the segments."""
    output = prediction.output
    if "panoptic_seg" in output and output["panoptic_seg"][1] is not None:
        ids = to_array(output["panoptic_seg"][0]).astype(np.int64)
        listed = [(int(s["id"]), int(s["category_id"])) for s in output["panoptic_seg"][1]]
    elif prediction.kind == "semantic":
        labels = class_labels(output)
        ids, listed = labels + 1, [(c + 1, c) for c in np.unique(labels).tolist() if c >= 0]
    else:
        found, ids, listed = prediction.objects, np.zeros(prediction.image.shape[:2], np.int64), []
        if found.masks is None:
            raise ValueError("panoptic files need masks, and the model predicts boxes only")
        for i in np.argsort(found.scores, kind="stable").tolist():
            ids[found.masks[i]] = i + 1
            listed.append((i + 1, int(found.classes[i])))
    rows = []
    for number, category in listed:
        rows_of, columns = np.nonzero(ids == number)
        if not len(rows_of):
            continue
        x, y = int(columns.min()), int(rows_of.min())
        box = [x, y, int(columns.max()) + 1 - x, int(rows_of.max()) + 1 - y]
        rows.append({"id": number, "category_id": category, "area": len(rows_of), "bbox": box, "iscrowd": 0})
    return ids, rows


def _outline(mask: npt.NDArray[np.bool_]) -> list[tuple[int, int]]:
    """Return the outline of the largest part of a mask as points (x, y); empty for fewer than 3 points."""
    contours, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    best = max(contours, key=cv2.contourArea, default=None)
    if best is None or len(best) < 3:
        return []
    return [(int(x), int(y)) for x, y in best.reshape(-1, 2)]
