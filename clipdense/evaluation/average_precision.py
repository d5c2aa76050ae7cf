"""Average precision of boxes and masks under the rules of COCO and LVIS.

Two backends compute the same table of precisions: `hotcoco` (Rust, the default) and the reference,
pycocotools (with LVIS's rules in `lvis_reference`). They agree to the last bit on the real samples. Both
backends correct errors of the libraries:

- pycocotools uses the annotation id 0 for "unmatched", and hotcoco stores ids as floating-point numbers:
  images, categories and annotations are numbered from 1 (see `GroundTruth`);
- pycocotools fails on an annotation without an area, hotcoco counts it as small: it gets its box's area;
- pycocotools fails on an annotation without a mask, hotcoco takes its box for the mask: it counts as missed
  in the evaluation of masks;
- pycocotools fails on an empty list of results: AP is 0 for classes with ground truth, NaN for others;
- lvis-api drops annotations and detections with area 0, so that an empty mask is not a false positive, as it
  is for COCO. hotcoco keeps them. They are dropped here after the limit per image is applied, which gives
  LVIS's published numbers.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Collection, Mapping, Set
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import hotcoco
import numpy as np
import numpy.typing as npt

from clipdense.evaluation.detections import Detections
from clipdense.evaluation.ground_truth import GroundTruth, Rules

__all__ = ["BACKENDS", "DEFAULT_MAX_DETS", "PrecisionTable", "Rules", "average_precision_backend"]

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
        self, iou: float | None = None, area: Area = "all", category_ids: Collection[int | str] | None = None
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
    """Metric library with the ground truth of a dataset, against which detections are scored."""

    def __init__(self, truth: GroundTruth, rules: Rules) -> None: ...

    @property
    def categories(self) -> list[dict[str, Any]]:
        """Category dicts of the annotation file, in the order of their ids."""

    @property
    def image_ids(self) -> Set[int | str]:
        """Ids of the images in the annotation file."""

    def table(self, detections: Detections, iou_type: str, max_dets: int) -> PrecisionTable:
        """Compute precisions of detections.

        Args:
            detections: of images in ``image_ids``, with the ids of the dataset.
            iou_type: "bbox" or "segm".
            max_dets: limit on detections, see `DEFAULT_MAX_DETS`.
        """


def average_precision_backend(name: str, json_file: str, rules: Rules) -> Backend:
    """Load an annotation file in COCO's or LVIS's format into the backend of a name.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If the backend is unknown, or the file has another format or a fault.
    """
    if name not in BACKENDS:
        raise ValueError(f"TEST.METRIC_BACKEND is {name!r}; expected {', '.join(BACKENDS)}")
    backend: Backend = BACKENDS[name](GroundTruth.read(json_file, rules), rules)
    return backend


class _NumberedBackend:
    """Shared part of the backends, which work on numbers instead of ids."""

    def __init__(self, truth: GroundTruth, rules: Rules) -> None:
        self._truth, self._rules = truth, rules
        self._ground_truths: dict[str, Any] = {}

    @property
    def categories(self) -> list[dict[str, Any]]:
        """See `Backend`."""
        return self._truth.categories

    @property
    def image_ids(self) -> Set[int | str]:
        """See `Backend`."""
        return self._truth.image_numbers.keys()

    def table(self, detections: Detections, iou_type: str, max_dets: int) -> PrecisionTable:
        """See `Backend`."""
        truth, detections = self._prepare(detections, iou_type, max_dets)
        arrays = self._evaluate(truth, detections, iou_type, max_dets)
        return PrecisionTable(arrays["precision"][..., -1], arrays["recall"][..., -1], self.categories)

    def _prepare(self, detections: Detections, iou_type: str, max_dets: int) -> tuple[Any, Detections]:
        """Return the ground truth of a task in the library, and the detections with numbers as ids."""
        if self._rules == "lvis":
            detections = detections.top_per_image(max_dets)
            detections = detections[detections.areas(iou_type) > 0]
        if iou_type not in self._ground_truths:
            self._ground_truths[iou_type] = self._load_truth(iou_type)
        return self._ground_truths[iou_type], self._truth.numbered(detections)

    def _load_truth(self, iou_type: str) -> Any:
        """Load the ground truth of a task into the library."""
        raise NotImplementedError

    def _evaluate(
        self, truth: Any, detections: Detections, iou_type: str, max_dets: int
    ) -> Mapping[str, Any]:
        """Compute the library's arrays ``precision`` (T, R, K, A, M) and ``recall`` (T, K, A, M)."""
        raise NotImplementedError


class HotcocoBackend(_NumberedBackend):
    """`Backend` on hotcoco, which takes arrays."""

    def _load_truth(self, iou_type: str) -> hotcoco.COCO:
        return hotcoco.COCO(self._truth.to_coco(iou_type))

    def evaluation(self, detections: Detections, iou_type: str, max_dets: int) -> hotcoco.COCOeval:
        """Match detections, for analyses beyond a table of precisions.

        Args:
            detections: of images in ``image_ids``, with the ids of the dataset.
            iou_type: "bbox" or "segm".
            max_dets: limit on detections, see `DEFAULT_MAX_DETS`.

        Returns:
            hotcoco's evaluation, accumulated. Images and categories are numbered from 1, in the order of
            their ids.
        """
        return self._match(*self._prepare(detections, iou_type, max_dets), iou_type, max_dets)

    def _evaluate(
        self, truth: hotcoco.COCO, detections: Detections, iou_type: str, max_dets: int
    ) -> Mapping[str, Any]:
        arrays: Any = self._match(truth, detections, iou_type, max_dets).eval
        return arrays

    def _match(
        self, truth: hotcoco.COCO, detections: Detections, iou_type: str, max_dets: int
    ) -> hotcoco.COCOeval:
        results = self._load_results(truth, detections, iou_type)
        evaluation = hotcoco.COCOeval(truth, results, iou_type, lvis_style=self._rules == "lvis")
        if self._rules == "coco":
            evaluation.params.max_dets = [max_dets]
        evaluation.evaluate()
        evaluation.accumulate()
        return evaluation

    def _load_results(self, truth: hotcoco.COCO, detections: Detections, iou_type: str) -> hotcoco.COCO:
        if not len(detections):
            results = truth.load_res([])
        else:
            rows = np.column_stack(
                [detections.image_ids, detections.boxes, detections.scores, detections.category_ids]
            )
            masks: Any = detections.masks if iou_type == "segm" else None
            results = truth.load_res(rows, segmentation=masks)
            if iou_type == "segm":  # small, medium and large are areas of the mask, not of the box
                results.update_anns(ids=np.arange(1, len(rows) + 1), area=detections.areas("segm"))
        # None: the limit per image, which LVISeval would set to 300, has been applied already
        return results.cap_detections_per_image(None) if self._rules == "lvis" else results


class PycocotoolsBackend(_NumberedBackend):
    """`Backend` on pycocotools: slow, the reference."""

    def _load_truth(self, iou_type: str) -> Any:
        from pycocotools.coco import COCO

        truth = COCO()
        truth.dataset = self._truth.to_coco(iou_type)
        with contextlib.redirect_stdout(io.StringIO()):
            truth.createIndex()
        return truth

    def _evaluate(
        self, truth: Any, detections: Detections, iou_type: str, max_dets: int
    ) -> Mapping[str, Any]:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval

        from clipdense.evaluation.lvis_reference import FederatedCOCOeval

        with contextlib.redirect_stdout(io.StringIO()):
            if len(detections):
                # if results have a box, loadRes uses its area instead of the mask's
                results = truth.loadRes(detections.to_json(boxes=iou_type == "bbox"))
            else:
                results = COCO()
                results.dataset = {**truth.dataset, "annotations": []}
                results.createIndex()
            evaluate = FederatedCOCOeval if self._rules == "lvis" else COCOeval
            evaluation = evaluate(truth, results, iou_type)
            evaluation.params.maxDets = [max_dets]
            evaluation.evaluate()
            evaluation.accumulate()
        arrays: Mapping[str, Any] = evaluation.eval
        return arrays


BACKENDS: dict[str, type[Any]] = {"hotcoco": HotcocoBackend, "reference": PycocotoolsBackend}
