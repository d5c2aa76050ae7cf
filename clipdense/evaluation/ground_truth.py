"""Ground truth of detection metrics: a checked annotation file whose rows are numbered from 1.

The metric libraries read ids as 64-bit floating-point numbers or integers. Images, categories and annotations
are therefore numbered internally, so that text, negative and very large ids are evaluated correctly. Files of
results keep the ids of the dataset.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from clipdense.data.validation import id_order, read_coco
from clipdense.evaluation.detections import Detections

__all__ = ["GroundTruth", "Rules"]

logger = logging.getLogger(__name__)

Rules = Literal["coco", "lvis"]
Id = int | str

_FEDERATED = ("neg_category_ids", "not_exhaustive_category_ids")


@dataclass(frozen=True)
class GroundTruth:
    """Images, categories and annotations of a file in COCO's or LVIS's format.

    Images and categories are numbered in the order of their ids, annotations in the order of the file: ties
    between scores are resolved as by the libraries on the file itself.

    Attributes:
        images: rows with the number as ``id``; under LVIS's rules with their lists of category numbers.
        annotations: rows with numbers as ``id``, ``image_id`` and ``category_id``, with ``bbox``, ``area``
            (the box's if the file has none), ``iscrowd`` and, if the object has a mask, ``segmentation``.
        categories: K category dicts of the file, with their own ids, in the order of the ids; the k-th has
            number k + 1.
        image_numbers: image id -> number.
        category_numbers: category id -> number.
    """

    images: list[dict[str, Any]]
    annotations: list[dict[str, Any]]
    categories: list[dict[str, Any]]
    image_numbers: dict[Id, int]
    category_numbers: dict[Id, int]

    @classmethod
    def read(cls, json_file: str, rules: Rules) -> GroundTruth:
        """Read and check an annotation file.

        Raises:
            FileNotFoundError: If the file does not exist.
            ValueError: If the file has another format, or a fault that would make the metrics wrong; names
                the file, the place and the remedy.
        """
        content, report = read_coco(
            json_file, "lvis" if rules == "lvis" else "instances", image_names_required=False
        )
        report.raise_errors()
        images = sorted(content["images"], key=lambda image: id_order(image["id"]))
        categories = sorted(content["categories"], key=lambda category: id_order(category["id"]))
        image_numbers = {image["id"]: number for number, image in enumerate(images, 1)}
        category_numbers = {category["id"]: number for number, category in enumerate(categories, 1)}
        annotations = [_annotation(row, image_numbers, category_numbers) for row in content["annotations"]]
        if rules == "lvis":
            annotations = [row for row in annotations if row["area"] > 0]
        for number, row in enumerate(annotations, 1):
            row["id"] = number
        numbered = [
            _image(image, number, category_numbers if rules == "lvis" else {})
            for number, image in enumerate(images, 1)
        ]
        truth = cls(numbered, annotations, categories, image_numbers, category_numbers)
        if 0 < (missing := truth.num_without_mask) < len(annotations):
            logger.warning(
                "%s: %d of %d objects have a box but no mask; they count as missed in mask AP",
                json_file,
                missing,
                len(annotations),
            )
        return truth

    @property
    def num_without_mask(self) -> int:
        """Number of objects that have a box but no mask."""
        return sum("segmentation" not in row for row in self.annotations)

    def to_coco(self, iou_type: str) -> dict[str, Any]:
        """Return the content of an annotation file with numbers as ids.

        Args:
            iou_type: "bbox" or "segm". For "segm", an object without a mask gets an empty one, so that no
                detection matches it; if no object has a mask, there is nothing to evaluate.
        """
        annotations = self.annotations
        if iou_type != "segm":
            annotations = [{k: v for k, v in row.items() if k != "segmentation"} for row in annotations]
        elif missing := self.num_without_mask:
            sizes = {image["id"]: (image["height"], image["width"]) for image in self.images}
            annotations = (
                []
                if missing == len(annotations)
                else [{"segmentation": _empty_mask(*sizes[row["image_id"]]), **row} for row in annotations]
            )
        categories = [{"id": k, "name": str(row["name"])} for k, row in enumerate(self.categories, 1)]
        return {"images": self.images, "annotations": annotations, "categories": categories}

    def numbered(self, detections: Detections) -> Detections:
        """Replace the ids of detections by numbers; detections of categories that the file lacks are dropped.

        Raises:
            ValueError: If a detection belongs to an image that the file lacks.
        """
        images = _numbers(detections.image_ids, self.image_numbers)
        if (unknown := images == 0).any():
            image_id = detections.image_ids[unknown].tolist()[0]
            raise ValueError(f"image {image_id!r} is not in the annotations")
        categories = _numbers(detections.category_ids, self.category_numbers)
        result = replace(detections, image_ids=images, category_ids=categories)
        return result if categories.all() else result[categories > 0]


def _numbers(ids: npt.NDArray[Any], numbers: Mapping[Id, int]) -> npt.NDArray[np.int64]:
    """Look up the numbers of ids; 0 for an unknown id."""
    return np.fromiter((numbers.get(i, 0) for i in ids.tolist()), np.int64, len(ids))


def _annotation(
    row: Mapping[str, Any], image_numbers: Mapping[Id, int], category_numbers: Mapping[Id, int]
) -> dict[str, Any]:
    numbered = {
        "id": 0,
        "image_id": image_numbers[row["image_id"]],
        "category_id": category_numbers[row["category_id"]],
        "bbox": row["bbox"],
        # pycocotools fails on an annotation without an area, hotcoco counts it as small
        "area": row.get("area", row["bbox"][2] * row["bbox"][3]),
        "iscrowd": row.get("iscrowd", 0),
    }
    return numbered | ({"segmentation": row["segmentation"]} if "segmentation" in row else {})


def _image(row: Mapping[str, Any], number: int, category_numbers: Mapping[Id, int]) -> dict[str, Any]:
    lists = {
        key: [category_numbers[c] for c in row.get(key, ()) if c in category_numbers]
        for key in (_FEDERATED if category_numbers else ())
    }
    return {"id": number, "file_name": "", "height": row["height"], "width": row["width"], **lists}


def _empty_mask(height: int, width: int) -> dict[str, Any]:
    return {"size": [height, width], "counts": [height * width]}
