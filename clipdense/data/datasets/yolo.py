"""A user's own data in YOLO's format: one text file an image, with boxes or polygons.

The readers of general libraries keep a mask of every object in memory and do not say in which line a fault
is, so the format is read here.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from clipdense.clip.vocabulary import Vocabulary
from clipdense.data.datasets.coco import register_instances
from clipdense.data.datasets.converted import converted_json
from clipdense.data.datasets.images import EXTENSIONS
from clipdense.data.datasets.registration import is_registered
from clipdense.data.image import header_size
from clipdense.data.validation.report import DataError, Report
from clipdense.files import read_text

__all__ = ["read_yolo", "read_yolo_yaml", "register_yolo"]

_ROUNDING = 0.01
"""Coordinates may lie this share of a side outside the image."""


def register_yolo(name: str, source: str, part: str, classes: str = "") -> None:
    """Register images with YOLO's boxes or polygons as instances.

    An image without a label file has no objects.

    Args:
        name: of the dataset.
        source: with three fields, the ``data.yaml`` of the dataset, or its folder; with four, the folder of
            the images.
        part: with three fields, ``train``, ``val`` or ``test``; with four, the folder of the label files.
        classes: file with the class names in the order of their numbers; needed with four fields only.

    Raises:
        FileNotFoundError: If a file or folder does not exist.
        DataError: If a label file has a fault; names the file and the line.
        ValueError: If the name is in use.
    """
    identity = {"yolo": ":".join(filter(None, (source, part, classes)))}
    if is_registered(name, identity):
        return
    if classes:
        for path in (source, part, classes):
            if not os.path.exists(path):
                raise FileNotFoundError(f"dataset {name}: {path} does not exist")
        names = list(Vocabulary.from_file(classes, separator=None).names)
        pairs = _pairs(_images_below(Path(source)), Path(source), Path(part))
    else:
        names, images = read_yolo_yaml(Path(source), part)
        pairs = _pairs(images)
    if not pairs:
        raise DataError(f"dataset {name}: no images ({', '.join(EXTENSIONS)}) in {source}")
    files = [path for pair in pairs for path in pair if path.exists()]
    root = Path(os.path.commonpath([image.parent.absolute() for image, _ in pairs]))
    label = f"{source} ({part})"
    json_file = converted_json(
        "yolo", [*names, str(root)], files, lambda: read_yolo(pairs, names, root, label)
    )
    register_instances(name, json_file, root, identity | {"source": label})


def read_yolo_yaml(path: Path, part: str) -> tuple[list[str], list[Path]]:
    """Read the class names and the images of one part of a YOLO dataset.

    Args:
        path: ``data.yaml``, or the folder with it. Its folders are relative to its ``path``, or else to the
            folder of the file.
        part: ``train``, ``val`` or ``test``; the value is a folder, a text file with one image a line, or a
            list of either.

    Raises:
        FileNotFoundError: If the file, a folder or a list does not exist.
        DataError: If the file has no class names or no such part.
    """
    path = path / "data.yaml" if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}, which names the classes and folders of a YOLO dataset")
    try:
        content = yaml.safe_load(read_text(path))
    except yaml.YAMLError as error:
        raise DataError(f"{path}: not a YAML file ({error})") from error
    content = content if isinstance(content, dict) else {}
    names = content.get("names")
    if isinstance(names, dict) and set(names) == set(range(len(names))):
        names = [names[k] for k in range(len(names))]
    if not isinstance(names, list) or not names:
        raise DataError(f'{path}: no "names"; expected a list of class names, or numbers from 0 with a name')
    if not content.get(part):
        parts = [key for key in ("train", "val", "test") if content.get(key)]
        raise DataError(f"{path}: no part {part!r}; the file has {', '.join(parts) or 'none'}")
    entries = content[part] if isinstance(content[part], list) else [content[part]]
    roots = [path.parent / str(content.get("path") or ""), path.parent]
    images: list[Path] = []
    for entry in entries:
        found = _find(str(entry), roots)
        if found is None:
            raise FileNotFoundError(f"{path}: {part}: {entry} does not exist below {roots[0]}")
        images += _images_below(found) if found.is_dir() else _listed(found)
    return [str(name) for name in names], images


def _find(entry: str, roots: Iterable[Path]) -> Path | None:
    """Find a folder or list; exported archives may name ``../train`` for a folder beside the file."""
    for root in roots:
        for name in (entry, entry.removeprefix("../")):
            if (root / name).exists():
                return root / name
    return None


def _images_below(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.suffix.lower() in EXTENSIONS)


def _listed(path: Path) -> list[Path]:
    """Read a list of images; relative names are relative to the folder of the list."""
    return [path.parent / line.strip() for line in read_text(path).splitlines() if line.strip()]


def _pairs(
    images: Iterable[Path], image_root: Path | None = None, label_root: Path | None = None
) -> list[tuple[Path, Path]]:
    """Return each image with its label file, which need not exist.

    Without roots, the last folder ``images`` of the path becomes ``labels``.
    """
    pairs = []
    for image in images:
        if image_root is not None and label_root is not None:
            label = label_root / image.relative_to(image_root)
        else:
            parts = list(image.parts)
            if "images" in parts[:-1]:
                parts[len(parts) - 2 - parts[-2::-1].index("images")] = "labels"
            label = Path(*parts)
        pairs.append((image, label.with_suffix(".txt")))
    return pairs


def read_yolo(
    pairs: Iterable[tuple[Path, Path]], names: list[str], root: Path, source: str
) -> tuple[dict[str, Any], Report]:
    """Read images and label files as the content of a COCO file.

    Args:
        pairs: images with their label files; a missing one says that there is no object.
        names: class names in the order of their numbers.
        root: folder to which the file names are relative.
        source: what is read, for the report.

    Returns:
        The content, and what was found; faults name the file and the line.
    """
    report = Report(source)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, (image, label) in enumerate(pairs, 1):
        size = header_size(image)
        if size is None:
            report.add("error", "files that are not images", str(image), "Replace or remove the file.")
            continue
        row = {"id": number, "file_name": os.path.relpath(image.absolute(), root)}
        images.append(row | {"height": size[0], "width": size[1]})
        if not label.is_file():
            report.add("note", "images without a label file", str(image), "They have no objects.")
            continue
        for place, line in enumerate(read_text(label).splitlines(), 1):
            if line.strip():
                found = _object(line.split(), size, len(names), f"{label}:{place}", report)
                if found is not None:
                    annotations.append({"id": len(annotations) + 1, "image_id": number, "iscrowd": 0} | found)
    report.counts = {"images": len(images), "annotations": len(annotations), "classes": len(names)}
    categories = [{"id": k, "name": name} for k, name in enumerate(names)]
    return {"images": images, "annotations": annotations, "categories": categories}, report


def _object(
    words: list[str], size: tuple[int, int], num_classes: int, place: str, report: Report
) -> dict[str, Any] | None:
    """Read one line: a class and x, y, width, height of its centre and size, or the points of a polygon."""
    try:
        values = [float(word) for word in words]
    except ValueError:
        report.add("error", "lines that are not numbers", place, "Expected a class number and coordinates.")
        return None
    if len(values) != 5 and (len(values) < 7 or len(values) % 2 == 0):
        report.add(
            "error",
            "lines with a wrong number of values",
            f"{place}: {len(values)}",
            "Expected 5 (class, x, y, width, height) or 7 and more (class, x, y of each point).",
        )
        return None
    category, numbers = values[0], values[1:]
    if category not in range(num_classes):
        report.add(
            "error",
            "class numbers without a name",
            f"{place}: {words[0]}",
            f"There are {num_classes} names: expected 0 to {num_classes - 1}.",
        )
        return None
    if not all(math.isfinite(v) and -_ROUNDING <= v <= 1 + _ROUNDING for v in numbers):
        report.add(
            "error", "coordinates outside 0 to 1", place, "Divide them by the width or height of the image."
        )
        return None
    height, width = size
    scaled = [v * (width, height)[k % 2] for k, v in enumerate(numbers)]
    if len(values) == 5:
        x, y, w, h = scaled
        return {"category_id": int(category), "bbox": [x - w / 2, y - h / 2, w, h], "area": w * h}
    xs, ys = scaled[::2], scaled[1::2]
    box = [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)]
    area = abs(sum(xs[i - 1] * ys[i] - xs[i] * ys[i - 1] for i in range(len(xs)))) / 2
    return {"category_id": int(category), "bbox": box, "area": area, "segmentation": [scaled]}
