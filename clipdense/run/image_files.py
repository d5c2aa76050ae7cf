"""Files of single images: label maps, panoptic maps and YOLO files."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, TypedDict

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image

from clipdense.files import atomic_path, write_text
from clipdense.run.prediction import Prediction
from clipdense.visualization.curves import class_color
from clipdense.visualization.segments import class_labels, to_array

__all__ = ["ImageFiles", "ImageRows", "UniqueNames", "rgb", "summary_rows"]


class ImageRows(TypedDict):
    """What the files that cover all images say of one image; JSON-ready.

    Attributes:
        image: its entry in ``images``.
        annotations: its instances as COCO annotations.
        segments: the segments of its map.
        panoptic: its entry in panoptic.json; None if panoptic maps are not written.
        summary: its rows of summary.csv.
    """

    image: dict[str, Any]
    annotations: list[dict[str, Any]]
    segments: list[dict[str, Any]]
    panoptic: dict[str, Any] | None
    summary: list[tuple[Any, ...]]


class UniqueNames:
    """File names without repetitions: the second ``a`` becomes ``a_2``.

    Args:
        used: names that are taken.
    """

    def __init__(self, used: Collection[str] = ()) -> None:
        self._used = {name.lower() for name in used}
        self._last: dict[str, int] = {}

    def __call__(self, stem: str, suffix: str = "") -> str:
        """Return ``stem + suffix`` with valid characters, and with a number if it is taken."""
        stem = re.sub(r'[\s/\\:*?"<>|]+', "_", stem)
        name = f"{stem}{suffix}"
        key = name.lower()
        number = self._last.get(key, 1)
        while name.lower() in self._used:
            number += 1
            name = f"{stem}_{number}{suffix}"
        self._last[key] = number
        self._used.add(name.lower())
        return name


class ImageFiles:
    """Writer of the files of single images, each as a whole or not at all.

    Args:
        new_file: from a name, such as ``labels/photo.png``, to the path to write.
        formats: keys of `clipdense.run.outputs.FORMATS`.
    """

    def __init__(self, new_file: Callable[[str], Path], formats: Collection[str]) -> None:
        self._new_file, self._formats = new_file, frozenset(formats)

    def write(self, prediction: Prediction, stem: str, image_id: int | str) -> ImageRows:
        """Write the files of an image.

        Args:
            prediction: what was found.
            stem: name of its files.
            image_id: number of the image in the rows.
        """
        height, width = prediction.image.shape[:2]
        image = {"id": image_id, "file_name": prediction.source, "height": height, "width": width}
        if "labels" in self._formats:
            self._labels(prediction, stem)
        if {"yolo", "yolo-seg"} & self._formats:
            self._yolo(prediction, stem)
        panoptic = self._panoptic(prediction, stem) if "panoptic" in self._formats else None
        number = {"image_id": image_id}
        return {
            "image": image,
            "annotations": [row | number for row in prediction.annotations()],
            "segments": [row | number for row in prediction.segments()],
            "panoptic": None if panoptic is None else number | panoptic,
            "summary": summary_rows(prediction) if "csv" in self._formats else [],
        }

    def _labels(self, prediction: Prediction, stem: str) -> None:
        labels, wide = prediction.labels, len(prediction.names) > 255
        dtype, empty = (np.uint16, 65535) if wide else (np.uint8, 255)
        image = Image.fromarray(np.where(labels < 0, empty, labels).astype(dtype))
        if not wide:  # PNG has palettes for 8 bits only
            image.putpalette(_palette(len(prediction.names)))
        with atomic_path(self._new_file(f"labels/{stem}.png")) as part:
            image.save(part, format="PNG")

    def _panoptic(self, prediction: Prediction, stem: str) -> dict[str, Any]:
        ids, segments = _panoptic_map(prediction)
        colors = np.stack([ids & 255, ids >> 8 & 255, ids >> 16 & 255], axis=-1).astype(np.uint8)
        with atomic_path(self._new_file(f"panoptic/{stem}.png")) as part:
            Image.fromarray(colors).save(part, format="PNG")
        return {"file_name": f"{stem}.png", "segments_info": segments}

    def _yolo(self, prediction: Prediction, stem: str) -> None:
        found, (height, width) = prediction.objects, prediction.image.shape[:2]
        lines = []
        for i, (x0, y0, x1, y1) in enumerate(found.boxes.tolist()):
            shares = [(x0 + x1) / 2 / width, (y0 + y1) / 2 / height, (x1 - x0) / width, (y1 - y0) / height]
            if "yolo-seg" in self._formats and found.masks is not None:
                points = _outline(found.masks[i])
                shares = [
                    value / side
                    for point in points
                    for value, side in zip(point, (width, height), strict=True)
                ]
            if shares:
                lines.append(" ".join([str(found.classes[i]), *(f"{share:.6f}" for share in shares)]))
        write_text(self._new_file(f"yolo/{stem}.txt"), "".join(f"{line}\n" for line in lines))


def summary_rows(prediction: Prediction) -> list[tuple[Any, ...]]:
    """Return the rows of one image or frame in summary.csv."""
    found, names, rows = prediction.objects, prediction.names, []
    frame = "" if prediction.frame is None else prediction.frame
    for c in np.unique(found.classes).tolist():
        chosen = found.classes == c
        share = "" if found.masks is None else f"{found.masks[chosen].any(0).mean():.4f}"
        name = names[c] if c < len(names) else str(c)
        best = f"{found.scores[chosen].max():.3f}"
        rows.append((prediction.source, frame, name, int(chosen.sum()), share, best))
    return rows


def rgb(index: int) -> tuple[int, int, int]:
    """Return the colour of a class, 0..255."""
    red, green, blue = (round(255 * value) for value in class_color(index))
    return red, green, blue


def _palette(num_classes: int) -> list[int]:
    """Return the palette of a label map, 256 RGB triples: the colours of the classes; white for no class."""
    colors = [rgb(i) for i in range(min(num_classes, 255))]
    return [value for color in [*colors, *[(255, 255, 255)] * (256 - len(colors))] for value in color]


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
