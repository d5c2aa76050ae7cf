"""Mean intersection over union of semantic segmentation.

There are two definitions of the mean. They differ for a class that is predicted but never labelled, which is
frequent in vocabularies of hundreds of classes: ``mIoU`` counts it with IoU 0 (Detectron2 0.6, and so OVSeg,
ZegFormer and zsseg); ``mIoU_d2`` is the mean over labelled classes only (Detectron2 since July 2022).
"""

from __future__ import annotations

import logging
import os
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from clipdense.clip.vocabulary import Vocabulary
from clipdense.data.image import read_labels
from clipdense.data.json_files import load_json
from clipdense.evaluation.base import Results, TaskEvaluator, distinct_names
from clipdense.evaluation.detections import RLE, encode_masks
from clipdense.evaluation.groups import class_groups, thing_groups

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.logger import create_small_table

__all__ = ["SemanticEvaluator", "load_allowed_pairs", "relax_confusion", "segmentation_metrics"]

logger = logging.getLogger(__name__)

Array = npt.NDArray[np.float64]

NO_CLASS = -1
"""Label of a pixel that a model rejects, e.g. because its best score is low and no class is background."""


class SemanticEvaluator(TaskEvaluator):
    """IoU of ``"sem_seg"`` (K, H, W), or of ``"sem_seg_labels"`` (H, W) for large vocabularies.

    Results are ``{"sem_seg": {"mIoU", "mIoU_d2", "fwIoU", "mACC", "pACC"}}`` in percent (see
    `segmentation_metrics`), Detectron2's keys. A pixel labelled -1 has no predicted class: it counts as
    missed, and for no other class. Groups of classes in the metadata, and things and stuff where it tells
    them apart, add ``mIoU_<group>`` and ``mIoU_d2_<group>``; base and novel classes together add their
    harmonic means ``hIoU`` and ``hIoU_d2``.
    `per_class` adds ``IoU-<class>`` and ``ACC-<class>``; `allowed_pairs` adds ``mIoU_relaxed``,
    ``mIoU_d2_relaxed`` and ``pACC_relaxed``. The predictions are written to ``sem_seg_predictions.json`` in
    COCO's format for stuff.

    Args:
        dataset_name: registered dataset whose dicts have ``sem_seg_file_name``, and whose metadata has
            ``stuff_classes`` and ``ignore_label``.
        output_dir: folder for the predictions; None writes nothing.
        per_class: whether to report each class.
        allowed_pairs: file for `load_allowed_pairs`: predictions accepted besides the true class.
    """

    outputs: tuple[str, ...] = ("sem_seg", "sem_seg_labels")

    def __init__(
        self,
        dataset_name: str,
        output_dir: str | None = None,
        *,
        per_class: bool = False,
        allowed_pairs: str | os.PathLike[str] | None = None,
        distributed: bool = True,
        optional: bool = False,
    ) -> None:
        super().__init__(output_dir, distributed=distributed, optional=optional)
        metadata = MetadataCatalog.get(dataset_name)
        self._name = dataset_name
        self._per_class = per_class
        self._classes = list(metadata.stuff_classes)
        self._ignore = metadata.get("ignore_label")
        self._groups = class_groups(metadata, self._classes) | thing_groups(metadata, self._classes)
        self._allowed = None if allowed_pairs is None else load_allowed_pairs(allowed_pairs, self._classes)
        self._ground_truth = {
            d["file_name"]: d["sem_seg_file_name"] for d in DatasetCatalog.get(dataset_name)
        }
        ids = metadata.get("stuff_dataset_id_to_contiguous_id") or {}
        self._dataset_ids = {contiguous: dataset_id for dataset_id, contiguous in ids.items()}

    def process_image(self, sample: dict[str, Any], output: dict[str, Any]) -> Any:
        """Compute the non-zero cells of the image's confusion matrix, and the prediction in COCO's format."""
        labels = output["sem_seg_labels"] if "sem_seg_labels" in output else output["sem_seg"].argmax(dim=0)
        predicted = labels.cpu().numpy().astype(np.int64)
        file_name = sample["file_name"]
        actual, evaluated = self._labels(file_name)
        if predicted.shape != actual.shape:
            raise ValueError(f"{file_name}: prediction of shape {predicted.shape}, labels of {actual.shape}")
        k = len(self._classes)
        predicted = predicted[evaluated]
        self._check(predicted[predicted != NO_CLASS], f"prediction of {file_name}")
        predicted = np.where(predicted == NO_CLASS, k, predicted)  # the last column
        counts = np.bincount(actual[evaluated] * (k + 1) + predicted, minlength=k * (k + 1))
        cells = np.flatnonzero(counts)
        return cells, counts[cells], self._encode(file_name, labels) if self._output_dir else []

    def _labels(self, file_name: str) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
        """Read the true classes (H, W) of an image, and the mask (H, W) of pixels that are evaluated."""
        path = self._ground_truth[file_name]
        actual = read_labels(path).astype(np.int64)
        evaluated = np.ones(actual.shape, bool) if self._ignore is None else actual != self._ignore
        self._check(actual[evaluated], path)
        return actual, evaluated

    def _check(self, labels: npt.NDArray[np.int64], source: str) -> None:
        k = len(self._classes)
        if labels.size and not 0 <= labels.min() <= labels.max() < k:
            raise ValueError(
                f"{source}: labels {labels.min()} to {labels.max()}, but '{self._name}' has {k} classes "
                f"(void is {self._ignore})"
            )

    def score(self, records: list[Any]) -> Results:
        """Compute means of IoU and accuracy, over all classes and over groups."""
        k = len(self._classes)
        pixels = np.zeros(k * (k + 1), np.int64)
        for cells, counts, _ in records:
            pixels[cells] += counts
        if self._output_dir:
            self.save("sem_seg_predictions.json", [segment for record in records for segment in record[2]])
        confusion = pixels.reshape(k, k + 1)
        metrics, iou, accuracy = segmentation_metrics(confusion, self._groups)
        if self._allowed is not None:
            relaxed = segmentation_metrics(relax_confusion(confusion, self._allowed))[0]
            metrics |= {f"{key}_relaxed": relaxed[key] for key in ("mIoU", "mIoU_d2", "pACC")}
        logger.info("%s:\n%s", self._name, create_small_table(metrics))
        if self._per_class:
            names = distinct_names(self._classes, [self._dataset_ids.get(i, i) for i in range(k)])
            for prefix, values in (("IoU", iou), ("ACC", accuracy)):
                metrics.update({f"{prefix}-{name}": float(v) for name, v in zip(names, values, strict=True)})
        return OrderedDict(sem_seg=metrics)

    def _encode(self, file_name: str, labels: Any) -> list[dict[str, Any]]:
        present = labels.unique()
        present = present[present != NO_CLASS]
        masks: Iterable[RLE] = encode_masks(labels[None] == present[:, None, None])
        return [
            {"file_name": file_name, "category_id": self._dataset_ids.get(i, i), "segmentation": mask}
            for i, mask in zip(present.tolist(), masks, strict=True)
        ]


def _mean(values: Array) -> float:
    """Return the mean of the values that are not NaN; NaN if all are."""
    return float(values[~np.isnan(values)].mean()) if not np.isnan(values).all() else float("nan")


def segmentation_metrics(
    confusion: npt.NDArray[np.int64], groups: Mapping[str, Sequence[int]] | None = None
) -> tuple[dict[str, float], Array, Array]:
    """Compute semantic segmentation metrics from a confusion matrix.

    Args:
        confusion: (K, K) pixel counts, (actual, predicted); a further column counts pixels without a
            predicted class.
        groups: group name -> classes.

    Returns:
        Means in percent: ``mIoU`` over the classes that are labelled or predicted somewhere, ``mIoU_d2``
        over the labelled classes, ``fwIoU`` weighted by labelled pixels, ``mACC`` over the labelled classes,
        ``pACC`` over pixels; ``mIoU_<group>`` and ``mIoU_d2_<group>``; if there are novel classes, the
        harmonic means ``hIoU`` and ``hIoU_d2`` of base and novel classes. Then IoU of each class (K,) in
        percent: zero if it is predicted but never labelled, NaN if neither. Then accuracy of each class (K,)
        in percent: NaN if not labelled.
    """
    hit, actual = np.diag(confusion).astype(float), confusion.sum(1)
    predicted = confusion[:, : len(confusion)].sum(0)
    unknown = np.full(len(hit), np.nan)
    iou = 100 * np.divide(hit, actual + predicted - hit, out=unknown.copy(), where=actual + predicted > 0)
    accuracy = 100 * np.divide(hit, actual, out=unknown.copy(), where=actual > 0)
    labelled = actual > 0
    means = dict.fromkeys(("mIoU", "mIoU_d2", "fwIoU", "mACC", "pACC"), float("nan"))
    if labelled.any():
        means = {
            "mIoU": _mean(iou),
            "mIoU_d2": _mean(iou[labelled]),
            "fwIoU": float((iou[labelled] * actual[labelled]).sum() / actual.sum()),
            "mACC": float(accuracy[labelled].mean()),
            "pACC": 100 * float(hit.sum() / actual.sum()),
        }
    for suffix, values in (("", iou), ("_d2", np.where(labelled, iou, np.nan))):
        group = {name: _mean(values[classes]) for name, classes in (groups or {}).items()}
        means |= {f"mIoU{suffix}_{name}": mean for name, mean in group.items()}
        if "novel" in group:
            product, total = group["base"] * group["novel"], group["base"] + group["novel"]
            means[f"hIoU{suffix}"] = 2 * product / total if total != 0 else 0.0
    return means, iou, accuracy


def relax_confusion(
    confusion: npt.NDArray[np.int64], allowed: npt.NDArray[np.bool_]
) -> npt.NDArray[np.int64]:
    """Count allowed confusions as correct: move them to the diagonal of a confusion matrix.

    Args:
        confusion: (K, K) or (K, K + 1) pixel counts, see `segmentation_metrics`.
        allowed: (K, K) bool, True where the predicted class is accepted for the actual one.
    """
    k = len(confusion)
    moved = np.where(allowed, confusion[:, :k], 0)
    relaxed = confusion.copy()
    relaxed[:, :k] += np.diag(moved.sum(1)) - moved
    return relaxed


def load_allowed_pairs(path: str | os.PathLike[str], classes: Sequence[str]) -> npt.NDArray[np.bool_]:
    """Load the predictions that are accepted besides the true class: synonyms, parts, hypernyms.

    Args:
        path: JSON file ``{"true class": ["accepted class", ...], ...}``. It is not symmetric: "building" may
            be accepted for a house while "house" is wrong for a building.
        classes: K class names. The file may use any synonym of a class, or the whole string.

    Returns:
        (K, K) bool, (actual, predicted); the diagonal is False.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file has another structure, or names an unknown class; similar names are listed.
    """
    content = load_json(os.fspath(path))
    if not isinstance(content, dict) or not all(
        isinstance(names, list) and all(isinstance(name, str) for name in names) for names in content.values()
    ):
        raise ValueError(f'{path}: expected {{"true class": ["accepted class", ...], ...}}')
    vocabulary = Vocabulary.from_names(classes)
    full_names = {name.strip(): i for i, name in enumerate(classes)}

    def index(name: str) -> int:
        try:
            return full_names[name] if name in full_names else vocabulary.index(name)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    allowed = np.zeros((len(classes), len(classes)), bool)
    for name, others in content.items():
        allowed[index(name), [index(other) for other in others]] = True
    np.fill_diagonal(allowed, False)
    return allowed
