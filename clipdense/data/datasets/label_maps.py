"""A user's own label maps as a dataset of semantic segmentation."""

from __future__ import annotations

import logging
import os
from functools import partial
from pathlib import Path

from clipdense.clip.vocabulary import Vocabulary
from clipdense.data.datasets.images import EXTENSIONS
from clipdense.data.datasets.layouts import DatasetDicts
from clipdense.data.datasets.registration import register_once
from clipdense.data.validation.report import DataError

__all__ = ["register_label_maps"]

logger = logging.getLogger(__name__)

LABEL_EXTENSIONS = (".png", ".tif", ".tiff", ".bmp")


def register_label_maps(
    name: str, image_root: str, label_root: str, classes: str, ignore_label: str = "255"
) -> None:
    """Register images with label maps of the same stem, in equal subfolders.

    Args:
        name: of the dataset.
        image_root: folder of the images; those without a label map are left out.
        label_root: folder of the label maps: PNG, TIFF or BMP files of one channel or with a palette, whose
            values (or palette indices) are class numbers from 0.
        classes: file with the class names in the order of these numbers: .txt with one name a line, or .json
            with a list.
        ignore_label: value of pixels without a class.

    Raises:
        FileNotFoundError: If a folder or the file does not exist.
        ValueError: If the name is in use, the file has no class names, or the value is not a number.
    """
    for what, path in (("image folder", image_root), ("folder of label maps", label_root)):
        if not os.path.isdir(path):
            raise FileNotFoundError(f"dataset {name}: no {what} {path}")
    if not os.path.isfile(classes):
        raise FileNotFoundError(
            f"dataset {name}: no file of class names {classes}; write one name a line, or a JSON list"
        )
    if not ignore_label.isdecimal():
        raise ValueError(
            f"dataset {name}: the value of pixels without a class is {ignore_label!r}; expected a number "
            "such as 255"
        )
    register_once(
        name,
        partial(_load, name, Path(image_root), Path(label_root)),
        {"image_root": image_root, "sem_seg_root": label_root, "classes_file": classes},
        {
            "evaluator_type": "sem_seg",
            "ignore_label": int(ignore_label),
            "stuff_classes": list(Vocabulary.from_file(classes, separator=None).names),
        },
    )


def _load(name: str, image_root: Path, label_root: Path) -> DatasetDicts:
    images = _files(name, image_root, EXTENSIONS)
    labels = _files(name, label_root, LABEL_EXTENSIONS)
    if not labels:
        raise DataError(f"dataset {name}: no label map ({', '.join(LABEL_EXTENSIONS)}) in {label_root}")
    if missing := sorted(labels.keys() - images.keys()):
        raise DataError(
            f"dataset {name}: {len(missing)} of {len(labels)} label maps have no image in {image_root}, "
            f"first {labels[missing[0]]}; images and label maps need equal names, except the suffix"
        )
    logger.info("Found %d images with label maps of %s in %s", len(labels), name, label_root)
    return [
        {"file_name": str(images[key]), "image_id": key, "sem_seg_file_name": str(labels[key])}
        for key in sorted(labels)
    ]


def _files(name: str, root: Path, suffixes: tuple[str, ...]) -> dict[str, Path]:
    """Find files by their path below the root, without suffix."""
    found: dict[str, Path] = {}
    for path in sorted(p for p in root.rglob("*") if p.suffix.lower() in suffixes):
        key = path.relative_to(root).with_suffix("").as_posix()
        if key in found:
            raise DataError(f"dataset {name}: {found[key]} and {path} have the same name; remove one of them")
        found[key] = path
    return found
