"""A user's own COCO instances, given as they are or converted from another format."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from clipdense.data.datasets.layouts import DatasetDicts, load_instances
from clipdense.data.datasets.registration import register_once
from clipdense.data.validation.coco import read_categories
from clipdense.data.validation.report import DataError

__all__ = ["register_coco", "register_instances"]

logger = logging.getLogger(__name__)


def register_coco(name: str, json_file: str, image_root: str) -> None:
    """Register COCO instances whose class names come from the annotation file.

    Args:
        name: of the dataset.
        json_file: annotations in COCO's format.
        image_root: folder of the images.

    Raises:
        ValueError: If the name is in use, or the file has no list of categories.
        FileNotFoundError: If the file or the folder does not exist.
    """
    if not os.path.isfile(json_file):
        raise FileNotFoundError(f"dataset {name}: no annotation file {json_file}")
    if not os.path.isdir(image_root):
        raise FileNotFoundError(f"dataset {name}: no image folder {image_root}")
    register_instances(name, json_file, image_root, {"json_file": json_file, "image_root": image_root})


def register_instances(
    name: str, json_file: str | Path, image_root: str | Path, source: dict[str, str]
) -> None:
    """Register an annotation file in COCO's format, which may have been converted.

    Args:
        name: of the dataset.
        json_file: annotations in COCO's format.
        image_root: folder of the images.
        source: metadata entries that identify what the user has named, see `register_once`.

    Raises:
        ValueError: If the name is in use, or the file has no list of categories.
    """
    categories = read_categories(json_file)
    ids = {category["id"]: k for k, category in enumerate(categories)}
    register_once(
        name,
        partial(_load, name, str(json_file), str(image_root), ids),
        source,
        {
            "json_file": str(json_file),
            "image_root": str(image_root),
            "evaluator_type": "coco",
            "thing_classes": [category["name"] for category in categories],
            "thing_dataset_id_to_contiguous_id": ids,
        },
    )


def _load(name: str, json_file: str, image_root: str, ids: Mapping[Any, int]) -> DatasetDicts:
    try:
        records = load_instances(json_file, image_root, ids, ("keypoints",))
    except ValueError as error:
        raise DataError(f"dataset {name}: {error}") from error
    logger.info("Loaded %d images of %s from %s", len(records), name, json_file)
    return records
