"""Mean intersection over union of semantic segmentation."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from clipdense.data.image import read_labels
from clipdense.evaluation.base import Results, TaskEvaluator, class_table
from clipdense.evaluation.detections import RLE, encode_masks
from clipdense.evaluation.groups import class_groups

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.logger import create_small_table

__all__ = ["SemanticEvaluator", "segmentation_metrics"]

logger = logging.getLogger(__name__)

Array = npt.NDArray[np.float64]


class SemanticEvaluator(TaskEvaluator):
    """IoU of ``"sem_seg"`` (K, H, W), or of ``"sem_seg_labels"`` (H, W) where a vocabulary is large.

    Results are ``{"sem_seg": {"mIoU", "fwIoU", "mACC", "pACC"}}`` in percent (see `segmentation_metrics`),
    Detectron2's keys. Groups of classes in the metadata add ``mIoU_<group>``, and base with novel their
    harmonic mean ``hIoU``. `per_class` adds ``IoU-<class>`` and ``ACC-<class>``. The predictions are written
    to ``sem_seg_predictions.json`` in COCO's format for stuff.

    Args:
        dataset_name: registered data set whose dicts have ``sem_seg_file_name``, whose metadata
            ``stuff_classes`` and ``ignore_label``.
        output_dir: folder for the predictions; None keeps nothing.
        per_class: whether to report every class.
    """

    outputs = ("sem_seg", "sem_seg_labels")

    def __init__(
        self,
        dataset_name: str,
        output_dir: str | None = None,
        *,
        per_class: bool = False,
        distributed: bool = True,
        optional: bool = False,
    ) -> None:
        super().__init__(output_dir, distributed=distributed, optional=optional)
        metadata = MetadataCatalog.get(dataset_name)
        self._name = dataset_name
        self._per_class = per_class
        self._classes = list(metadata.stuff_classes)
        self._ignore = metadata.get("ignore_label")
        self._groups = class_groups(metadata, self._classes)
        self._ground_truth = {
            d["file_name"]: d["sem_seg_file_name"] for d in DatasetCatalog.get(dataset_name)
        }
        ids = metadata.get("stuff_dataset_id_to_contiguous_id") or {}
        self._dataset_ids = {contiguous: dataset_id for dataset_id, contiguous in ids.items()}

    def process_image(self, sample: dict[str, Any], output: dict[str, Any]) -> Any:
        """The filled cells of the image's confusion matrix, and the prediction in COCO's format."""
        labels = output["sem_seg_labels"] if "sem_seg_labels" in output else output["sem_seg"].argmax(dim=0)
        predicted = labels.cpu().numpy().astype(np.int64)
        file_name = sample["file_name"]
        gt_file = self._ground_truth[file_name]
        actual = read_labels(gt_file)
        if predicted.shape != actual.shape:
            raise ValueError(f"{file_name}: prediction of shape {predicted.shape}, labels of {actual.shape}")
        k = len(self._classes)
        judged = np.ones(actual.shape, bool) if self._ignore is None else actual != self._ignore
        for source, values in ((f"prediction of {file_name}", predicted), (gt_file, actual)):
            found = values[judged]
            if found.size and not 0 <= found.min() <= found.max() < k:
                raise ValueError(
                    f"{source}: labels {found.min()} to {found.max()}, but '{self._name}' has {k} classes "
                    f"(void is {self._ignore})"
                )
        counts = np.bincount(actual[judged] * k + predicted[judged], minlength=k * k)
        cells = np.flatnonzero(counts)
        return cells, counts[cells], self._encode(file_name, labels) if self._output_dir else []

    def score(self, records: list[Any]) -> Results:
        """IoU and accuracy, means and groups."""
        k = len(self._classes)
        confusion = np.zeros(k * k, np.int64)
        for cells, counts, _ in records:
            confusion[cells] += counts
        if self._output_dir:
            self.save("sem_seg_predictions.json", [segment for record in records for segment in record[2]])
        metrics, iou, accuracy = segmentation_metrics(confusion.reshape(k, k))
        for group, classes in self._groups.items():
            metrics[f"mIoU_{group}"] = _mean_iou(iou[classes])
        if "mIoU_novel" in metrics:
            base, novel = metrics["mIoU_base"], metrics["mIoU_novel"]
            metrics["hIoU"] = 2 * base * novel / (base + novel) if base + novel > 0 else 0.0 * (base + novel)
        logger.info("%s:\n%s", self._name, create_small_table(metrics))
        if self._per_class:
            by_class = class_table("IoU", zip(self._classes, iou.tolist(), strict=True))
            logger.info("%s by class:\n%s", self._name, by_class)
            for prefix, values in (("IoU", iou), ("ACC", accuracy)):
                metrics.update(
                    {f"{prefix}-{name}": float(v) for name, v in zip(self._classes, values, strict=True)}
                )
        return OrderedDict(sem_seg=metrics)

    def _encode(self, file_name: str, labels: Any) -> list[dict[str, Any]]:
        present = labels.unique()
        masks: Iterable[RLE] = encode_masks(labels[None] == present[:, None, None])
        return [
            {"file_name": file_name, "category_id": self._dataset_ids.get(i, i), "segmentation": mask}
            for i, mask in zip(present.tolist(), masks, strict=True)
        ]


def _mean_iou(iou: Array) -> float:
    """Mean over the classes that occur."""
    return float(iou[~np.isnan(iou)].mean()) if not np.isnan(iou).all() else float("nan")


def segmentation_metrics(confusion: npt.NDArray[np.int64]) -> tuple[dict[str, float], Array, Array]:
    """Metrics of a (K, K) confusion matrix (actual, predicted) of pixels.

    Returns:
        Means in percent: ``mIoU`` over the classes that are labelled or predicted somewhere, ``fwIoU``
        weighted by labelled pixels, ``mACC`` over the labelled classes, ``pACC`` over pixels. IoU of each
        class (K,) in percent: zero for one that is predicted but never labelled, NaN for one that is neither.
        Accuracy of each class (K,): NaN where not labelled.
    """
    hit, actual, predicted = np.diag(confusion).astype(float), confusion.sum(1), confusion.sum(0)
    unknown = np.full(len(hit), np.nan)
    iou = 100 * np.divide(hit, actual + predicted - hit, out=unknown.copy(), where=actual + predicted > 0)
    accuracy = 100 * np.divide(hit, actual, out=unknown.copy(), where=actual > 0)
    labelled = actual > 0
    if not labelled.any():
        return dict.fromkeys(("mIoU", "fwIoU", "mACC", "pACC"), float("nan")), iou, accuracy
    means = {
        "mIoU": _mean_iou(iou),
        "fwIoU": float((iou[labelled] * actual[labelled]).sum() / actual.sum()),
        "mACC": float(accuracy[labelled].mean()),
        "pACC": 100 * float(hit.sum() / actual.sum()),
    }
    return means, iou, accuracy
