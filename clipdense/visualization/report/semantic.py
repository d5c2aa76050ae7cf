"""Analysis of semantic segmentation: confusion of pixels, image by image."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pycocotools.mask as mask_util
import torch

from clipdense.data.image import read_labels
from clipdense.evaluation.semantic import segmentation_metrics
from clipdense.files import read_text
from clipdense.visualization.report.analysis import Analysis, ClassScore, Interval
from clipdense.visualization.report.document import Cell

__all__ = ["analyze_semantic", "predictions_file"]

Labels = npt.NDArray[np.int64]


def predictions_file(folder: Path) -> Path | None:
    """Return the semantic predictions in a folder; None without any."""
    path = folder / "sem_seg_predictions.json"
    return path if path.is_file() else None


def analyze_semantic(
    folder: Path, dataset: str, metadata: Any, records: Sequence[Mapping[str, Any]]
) -> Analysis:
    """Analyze the label maps of a run.

    Args:
        folder: folder of the predictions of the dataset.
        dataset: its name.
        metadata: its metadata, with ``stuff_classes`` and ``ignore_label``.
        records: its dicts, with ``file_name`` and ``sem_seg_file_name``.

    Raises:
        FileNotFoundError: If the folder has no predictions, or a label map does not exist.
        ValueError: If the predictions are damaged, or of another size than the ground truth.
    """
    path = predictions_file(folder)
    if path is None:
        raise FileNotFoundError(f"{folder} has no semantic predictions")
    names = list(metadata.stuff_classes)
    known = metadata.get("stuff_dataset_id_to_contiguous_id") or {i: i for i in range(len(names))}
    segments = _segments(path, known)
    ignore = metadata.get("ignore_label")
    images = {
        str(record["file_name"]): _confusion(record, segments, len(names), ignore)
        for record in records
        if str(record["file_name"]) in segments
    }
    if not images:
        raise ValueError(f"{path} has predictions of none of the {len(records)} images of {dataset}")
    stack = _Confusions(images, len(names))
    confusion = stack.total(np.ones(len(images)))
    metrics, iou, accuracy = segmentation_metrics(confusion)
    classes = [
        ClassScore(name, int(confusion[k].sum()), float(iou[k]), {"accuracy": float(accuracy[k])})
        for k, name in enumerate(names)
    ]
    return Analysis(
        dataset,
        "pixels",
        metrics,
        "IoU",
        classes,
        confusion,
        names,
        "Pixels of the ground truth; ignored ones are left out.",
        stack.image_scores(),
        partial(_output, segments),
        _bootstrap,
        {"Frequency of the class": _by_frequency(classes)},
        details=stack,
    )


class _Confusions:
    """Confusion matrices of all images, as their non-zero cells.

    Args:
        images: file -> cells and counts.
        num_classes: K.
    """

    def __init__(self, images: Mapping[str, tuple[Labels, Labels]], num_classes: int) -> None:
        self.files, self._cells, self._k = list(images), list(images.values()), num_classes

    def total(self, weights: npt.NDArray[np.float64]) -> Labels:
        """Return the sum (K, K) with a weight for each image (N,)."""
        total = np.zeros(self._k**2)
        for (cells, counts), weight in zip(self._cells, weights, strict=True):
            if weight:
                total[cells] += weight * counts
        return total.reshape(self._k, self._k).astype(np.int64)

    def image_scores(self) -> dict[int | str, float]:
        """Return the mean IoU over the classes of each image, in percent."""
        scores: dict[int | str, float] = {}
        for number, file in enumerate(self.files):
            matrix = self.total(np.eye(1, len(self.files), number)[0])
            scores[file] = segmentation_metrics(matrix)[0]["mIoU"]
        return {file: score for file, score in scores.items() if np.isfinite(score)}


def _segments(path: Path, known: Mapping[int, int]) -> dict[str, list[tuple[int, Any]]]:
    """Return class and run-length mask of each segment by image file."""
    found: dict[str, list[tuple[int, Any]]] = {}
    try:
        for row in json.loads(read_text(path)):
            entry = known.get(row["category_id"], -1), row["segmentation"]
            found.setdefault(str(row["file_name"]), []).append(entry)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a list of segments ({error})") from error
    return found


def _labels(segments: Sequence[tuple[int, Any]]) -> Labels:
    """Return the label map (H, W) of the segments of an image; -1 where there is none."""
    labels = np.full(segments[0][1]["size"], -1, np.int64)
    for category, mask in segments:
        labels[mask_util.decode(mask) > 0] = category
    return labels


def _confusion(
    record: Mapping[str, Any], segments: Mapping[str, list[tuple[int, Any]]], k: int, ignore: int | None
) -> tuple[Labels, Labels]:
    """Return the non-zero cells of an image's confusion matrix, and their counts."""
    actual = read_labels(record["sem_seg_file_name"])
    predicted = _labels(segments[str(record["file_name"])])
    if actual.shape != predicted.shape:
        raise ValueError(
            f"{record['file_name']}: prediction of {predicted.shape}, ground truth of {actual.shape}"
        )
    valid = (predicted >= 0) & (actual >= 0) & (actual < k)
    if ignore is not None:
        valid &= actual != ignore
    counts = np.bincount(actual[valid] * k + predicted[valid], minlength=k * k)
    cells = np.flatnonzero(counts)
    return cells, counts[cells]


def _by_frequency(classes: Sequence[ClassScore]) -> tuple[list[str], list[list[Cell]]]:
    order = sorted((row for row in classes if row.count), key=lambda row: row.count)
    rows: list[list[Cell]] = []
    size = -(-len(order) // 3) or 1
    for place, name in enumerate(("rarest", "middle", "most frequent")):
        part = order[place * size : (place + 1) * size]
        if part:
            mean = float(np.mean([row.score for row in part]))
            rows.append([f"{name} third of the classes", len(part), sum(row.count for row in part), mean])
    return ["classes", "number", "pixels", "mean IoU"], rows


def _output(segments: Mapping[str, list[tuple[int, Any]]], image: Any) -> dict[str, Any]:
    """Return the label map of an image as the output of a model."""
    return {"sem_seg_labels": torch.from_numpy(_labels(segments[str(image)]))}


def _bootstrap(first: Analysis, other: Analysis, samples: int) -> dict[str, Interval]:
    """Compare the metrics by resampling images: the same images for both runs."""
    one, two = first.details, other.details
    if one.files != two.files:
        raise ValueError("the runs have predictions of different images")
    generator = np.random.default_rng(0)
    differences: dict[str, list[float]] = {name: [] for name in first.metrics}
    for _ in range(samples):
        count = len(one.files)
        weights = np.bincount(generator.integers(0, count, count), minlength=count).astype(float)
        a, b = (segmentation_metrics(side.total(weights))[0] for side in (one, two))
        for name, values in differences.items():
            values.append(b[name] - a[name])
    return {
        name: Interval(
            first.metrics[name],
            other.metrics[name],
            *(np.percentile(values, [2.5, 97.5]).tolist() if values else (float("nan"),) * 2),
        )
        for name, values in differences.items()
    }
