"""Average precision of boxes and masks under the rules of COCO and LVIS.

Two backends compute the same table of precisions: `hotcoco` (Rust, the default) and the reference,
pycocotools (with LVIS's rules in `lvis_reference`). They agree to the last bit on the real samples. Both
backends correct errors of the libraries:

- pycocotools uses the annotation id 0 for "unmatched", so that it never finds a ground truth with this id:
  ids are renumbered from 1;
- pycocotools fails on an annotation without an area, hotcoco counts it as small: the area of its box is used;
- pycocotools fails on an empty list of results: AP is 0 for classes with ground truth, NaN for others;
- lvis-api drops annotations and detections with area 0, so that an empty mask is not a false positive, as it
  is for COCO. hotcoco keeps them. They are dropped here after the limit per image is applied, which gives
  LVIS's published numbers.
"""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import hotcoco
import numpy as np
import numpy.typing as npt

from clipdense.evaluation.detections import Detections

__all__ = ["BACKENDS", "DEFAULT_MAX_DETS", "PrecisionTable", "average_precision_backend"]

Rules = Literal["coco", "lvis"]
Area = Literal["all", "small", "medium", "large"]

DEFAULT_MAX_DETS = {"coco": 100, "lvis": 300}
"""Limit on detections: per image and class (COCO), per image (LVIS)."""

_THRESHOLDS = np.linspace(0.5, 0.95, 10)
_AREAS = ("all", "small", "medium", "large")


@dataclass
class PrecisionTable:
    """Precision of each class; every metric is a mean over entries of this table.

    Attributes:
        precision: (T, R, K, A): T=10 IoU thresholds 0.50:0.05:0.95, R=101 recalls 0:0.01:1, K classes, A=4
            areas (all, small < 32^2 <= medium < 96^2 <= large). Range 0 to 1; -1 for a class without ground
            truth.
        recall: (T, K, A), maximum recall; same range.
        categories: K category dicts of the ground truth, in order of their ids.
    """

    precision: npt.NDArray[np.float64]
    recall: npt.NDArray[np.float64]
    categories: list[dict[str, Any]]

    def ap(
        self, iou: float | None = None, area: Area = "all", category_ids: Collection[int] | None = None
    ) -> float:
        """Compute average precision in percent: the mean over the classes with ground truth; NaN without any.

        Args:
            iou: one IoU threshold; None: the mean over all ten.
            area: size range of the ground truth.
            category_ids: classes to average over; None: all.
        """
        precision = self.precision[..., _AREAS.index(area)]
        if iou is not None:
            precision = precision[np.isclose(_THRESHOLDS, iou)]
        if category_ids is not None:
            precision = precision[:, :, [c["id"] in category_ids for c in self.categories]]
        known = precision[precision > -1]
        return 100 * float(known.mean()) if known.size else float("nan")


class Backend(Protocol):
    """Ground truth of a dataset, against which detections are scored."""

    categories: list[dict[str, Any]]
    image_ids: frozenset[int]

    def __init__(self, json_file: str, rules: Rules) -> None: ...

    def table(self, detections: Detections, iou_type: str, max_dets: int) -> PrecisionTable:
        """Compute precisions of detections.

        Args:
            detections: of images in ``image_ids``.
            iou_type: "bbox" or "segm".
            max_dets: limit on detections, see `DEFAULT_MAX_DETS`.
        """


def average_precision_backend(name: str, json_file: str, rules: Rules) -> Backend:
    """Load an annotation file in COCO's or LVIS's format into the backend of a name.

    Raises:
        ValueError: If the backend is unknown, or the file has another format.
    """
    if name not in BACKENDS:
        raise ValueError(f"TEST.METRIC_BACKEND is {name!r}; expected {', '.join(BACKENDS)}")
    backend: Backend = BACKENDS[name](json_file, rules)
    return backend


def _repair(dataset: dict[str, Any], rules: Rules) -> None:
    """Correct ids and areas of ground-truth annotations (in place), see the module's docstring."""
    annotations = [{"area": a["bbox"][2] * a["bbox"][3], **a} for a in dataset["annotations"]]
    if rules == "lvis":
        annotations = [a for a in annotations if a["area"] > 0]
    if any(a["id"] == 0 for a in annotations):
        annotations = [{**a, "id": i} for i, a in enumerate(annotations, 1)]
    dataset["annotations"] = annotations


def _read_hotcoco(json_file: str) -> hotcoco.COCO:
    """Read an annotation file; entries that are null, which hotcoco refuses, are dropped."""
    try:
        return hotcoco.COCO(json_file)
    except ValueError as error:
        reason = error
    try:
        with open(json_file) as file:
            content = json.load(file)
        rows = {key: content.get(key) or [] for key in ("images", "annotations", "categories")}
        for key in rows:
            rows[key] = [{k: v for k, v in row.items() if v is not None} for row in rows[key]]
        return hotcoco.COCO(rows)
    except (ValueError, TypeError, AttributeError):
        raise ValueError(f"{json_file} is not an annotation file in COCO's format: {reason}") from reason


class HotcocoBackend:
    """`Backend` on hotcoco, which takes arrays."""

    def __init__(self, json_file: str, rules: Rules) -> None:
        self._rules = rules
        self._ground_truth = _read_hotcoco(json_file)
        ids = self._ground_truth.get_ann_ids()
        missing = len(ids) != len(self._ground_truth.get_ann_ids(area_rng=[-np.inf, np.inf]))
        no_area = rules == "lvis" and self._ground_truth.get_ann_ids(area_rng=[-np.inf, 1e-9])
        if missing or no_area or 0 in ids:
            dataset: Any = self._ground_truth.dataset
            _repair(dataset, rules)
            self._ground_truth = hotcoco.COCO(dataset)
        category_ids = sorted(self._ground_truth.get_cat_ids())
        self.categories = self._ground_truth.load_cats(category_ids)
        self.image_ids = frozenset(self._ground_truth.get_img_ids())

    def table(self, detections: Detections, iou_type: str, max_dets: int) -> PrecisionTable:
        """See `Backend`."""
        if self._rules == "lvis":
            detections = detections.top_per_image(max_dets)
            detections = detections[detections.areas(iou_type) > 0]
        evaluation = hotcoco.COCOeval(
            self._ground_truth, self._load(detections, iou_type), iou_type, lvis_style=self._rules == "lvis"
        )
        if self._rules == "coco":
            evaluation.params.max_dets = [max_dets]
        evaluation.evaluate()
        evaluation.accumulate()
        arrays: Any = evaluation.eval
        return PrecisionTable(arrays["precision"][..., -1], arrays["recall"][..., -1], self.categories)

    def _load(self, detections: Detections, iou_type: str) -> hotcoco.COCO:
        if not len(detections):
            results = self._ground_truth.load_res([])
        else:
            rows = np.column_stack(
                [detections.image_ids, detections.boxes, detections.scores, detections.category_ids]
            )
            masks: Any = detections.masks if iou_type == "segm" else None
            results = self._ground_truth.load_res(rows, segmentation=masks)
            if iou_type == "segm":  # small, medium and large are areas of the mask, not of the box
                results.update_anns(ids=np.arange(1, len(rows) + 1), area=detections.areas("segm"))
        # None: the limit per image, which LVISeval would set to 300, has been applied already
        return results.cap_detections_per_image(None) if self._rules == "lvis" else results


class PycocotoolsBackend:
    """`Backend` on pycocotools: slow, the reference."""

    def __init__(self, json_file: str, rules: Rules) -> None:
        from pycocotools.coco import COCO

        self._rules = rules
        with open(json_file) as file:
            dataset = json.load(file)
        dataset["annotations"] = [
            {"iscrowd": 0, **{key: value for key, value in annotation.items() if value is not None}}
            for annotation in dataset.get("annotations") or []
        ]
        _repair(dataset, rules)
        self._ground_truth = COCO()
        self._ground_truth.dataset = dataset
        with contextlib.redirect_stdout(io.StringIO()):
            self._ground_truth.createIndex()
        self.categories = sorted(dataset["categories"], key=lambda category: category["id"])
        self.image_ids = frozenset(self._ground_truth.getImgIds())

    def table(self, detections: Detections, iou_type: str, max_dets: int) -> PrecisionTable:
        """See `Backend`."""
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval

        from clipdense.evaluation.lvis_reference import FederatedCOCOeval

        if self._rules == "lvis":
            detections = detections.top_per_image(max_dets)
            detections = detections[detections.areas(iou_type) > 0]
        with contextlib.redirect_stdout(io.StringIO()):
            if len(detections):
                # if results have a box, loadRes uses its area instead of the mask's
                results = self._ground_truth.loadRes(detections.to_json(boxes=iou_type == "bbox"))
            else:
                results = COCO()
                results.dataset = {**self._ground_truth.dataset, "annotations": []}
                results.createIndex()
            evaluate = FederatedCOCOeval if self._rules == "lvis" else COCOeval
            evaluation = evaluate(self._ground_truth, results, iou_type)
            evaluation.params.maxDets = [max_dets]
            evaluation.evaluate()
            evaluation.accumulate()
        arrays = evaluation.eval
        return PrecisionTable(arrays["precision"][..., -1], arrays["recall"][..., -1], self.categories)


BACKENDS: dict[str, type[Any]] = {"hotcoco": HotcocoBackend, "reference": PycocotoolsBackend}
