"""Average precision of boxes and masks under the rules of COCO and LVIS.

Two backends compute the same table of precisions: `hotcoco` (Rust, the default) and the reference,
pycocotools (with LVIS's rules in `lvis_reference`). They agree to the last bit on the real samples; where a
reference library is at fault, both backends here give the right number:

- pycocotools takes the annotation id 0 for "unmatched", so that a ground truth with this id can never be
  found: ids are counted from 1 before it sees them;
- pycocotools fails on an annotation without an area, hotcoco counts it as small: the area of its box is
  taken;
- pycocotools fails on an empty list of results: AP is 0 for classes that occur, NaN where nothing could be
  found;
- lvis-api drops annotations and detections of no area (an empty mask is no false positive there, with COCO it
  is one). hotcoco keeps them; to give LVIS's published numbers they are dropped here, after the limit per
  image was applied.
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
"""Detections that count: per image and class (COCO), per image (LVIS)."""

_THRESHOLDS = np.linspace(0.5, 0.95, 10)
_AREAS = ("all", "small", "medium", "large")


@dataclass
class PrecisionTable:
    """Precision of every class, from which each metric is a mean.

    Attributes:
        precision: (T, R, K, A): T=10 IoU thresholds 0.50:0.05:0.95, R=101 recalls 0:0.01:1, K classes, A=4
            areas (all, small < 32^2 <= medium < 96^2 <= large). Range 0..1; -1 where a class has no ground
            truth.
        recall: (T, K, A), the highest recall reached; same range.
        categories: K category dicts of the ground truth, ordered by id.
    """

    precision: npt.NDArray[np.float64]
    recall: npt.NDArray[np.float64]
    categories: list[dict[str, Any]]

    def ap(
        self, iou: float | None = None, area: Area = "all", category_ids: Collection[int] | None = None
    ) -> float:
        """Mean over the classes that occur, in percent; NaN where none does.

        Args:
            iou: one threshold; None for the mean over all ten.
            area: size of the ground truth that counts.
            category_ids: classes that count; None for all.
        """
        precision = self.precision[..., _AREAS.index(area)]
        if iou is not None:
            precision = precision[np.isclose(_THRESHOLDS, iou)]
        if category_ids is not None:
            precision = precision[:, :, [c["id"] in category_ids for c in self.categories]]
        known = precision[precision > -1]
        return 100 * float(known.mean()) if known.size else float("nan")


class Backend(Protocol):
    """Holds the ground truth of a data set and scores detections against it."""

    categories: list[dict[str, Any]]
    image_ids: frozenset[int]

    def __init__(self, json_file: str, rules: Rules) -> None: ...

    def table(self, detections: Detections, iou_type: str, max_dets: int) -> PrecisionTable:
        """Precisions for ``"bbox"`` or ``"segm"``."""


def average_precision_backend(name: str, json_file: str, rules: Rules) -> Backend:
    """The backend of a name, with the ground truth of an annotation file in COCO's or LVIS's format loaded.

    Raises:
        ValueError: unknown backend, or a file that is no such annotation file.
    """
    if name not in BACKENDS:
        raise ValueError(f"TEST.METRIC_BACKEND is {name!r}; there are {', '.join(BACKENDS)}")
    backend: Backend = BACKENDS[name](json_file, rules)
    return backend


def _repair(dataset: dict[str, Any], rules: Rules) -> None:
    """What the module's docstring says of ids and areas, for the annotations of a ground truth (in place)."""
    annotations = [{"area": a["bbox"][2] * a["bbox"][3], **a} for a in dataset["annotations"]]
    if rules == "lvis":
        annotations = [a for a in annotations if a["area"] > 0]
    if any(a["id"] == 0 for a in annotations):
        annotations = [{**a, "id": i} for i, a in enumerate(annotations, 1)]
    dataset["annotations"] = annotations


def _read_hotcoco(json_file: str) -> hotcoco.COCO:
    """An annotation file; nulls, which hotcoco takes for an error, are left out."""
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
        raise ValueError(f"{json_file} is no annotation file in COCO's format: {reason}") from reason


class HotcocoBackend:
    """hotcoco, fed with arrays."""

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
            if iou_type == "segm":  # small, medium and large go by the mask, not by the box
                results.update_anns(ids=np.arange(1, len(rows) + 1), area=detections.areas("segm"))
        # `None` only says that the limit per image, which LVISeval would set to 300, has been applied
        return results.cap_detections_per_image(None) if self._rules == "lvis" else results


class PycocotoolsBackend:
    """pycocotools, slow and the measure of all others."""

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
                # with a box in it, loadRes takes the box's area for the mask's
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
