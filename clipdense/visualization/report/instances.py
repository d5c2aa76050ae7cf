"""Analysis of boxes or masks, by hotcoco."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import hotcoco
import numpy as np
import pycocotools.mask as mask_util
import torch

from clipdense.evaluation.average_precision import (
    DEFAULT_MAX_DETS,
    HotcocoBackend,
    PrecisionTable,
    Rules,
)
from clipdense.evaluation.detections import Detections
from clipdense.evaluation.ground_truth import GroundTruth
from clipdense.files import read_text
from clipdense.visualization.report.analysis import Analysis, ClassScore, Interval
from clipdense.visualization.report.document import Cell

from detectron2.structures import Boxes, Instances

__all__ = ["analyze_instances", "predictions_file"]

_ERRORS = {
    "Cls": "class: overlaps an object of another class",
    "Loc": "location: right class, IoU of 0.1 to 0.5",
    "Both": "both: another class, IoU of 0.1 to 0.5",
    "Dupe": "duplicate: the object has a better detection",
    "Bkg": "background: IoU below 0.1 with every object",
    "Miss": "missed: object without any of these detections",
    "FP": "all false positives",
    "FN": "all false negatives",
}


def predictions_file(folder: Path) -> tuple[Path, Rules] | None:
    """Return the detections in a folder of predictions, and the rules of their metric; None without any."""
    rules: Rules
    for rules in ("coco", "lvis"):
        if (path := folder / f"{rules}_instances_results.json").is_file():
            return path, rules
    return None


def analyze_instances(folder: Path, dataset: str, metadata: Any, min_score: float = 0.5) -> Analysis:
    """Analyze the detections of a run: masks if there are any, else boxes.

    Args:
        folder: folder of the predictions of the dataset.
        dataset: its name.
        metadata: its metadata, with ``json_file``.
        min_score: detections with a lower score, 0..1, are not drawn, and not in the confusion matrix.

    Raises:
        FileNotFoundError: If the folder has no detections, or the annotation file does not exist.
        ValueError: If a file is damaged.

    Source:
        Kinds of errors: Bolya et al., TIDE, ECCV 2020, sections 2.2 and 2.3, at the IoU thresholds 0.5 and
        0.1.
    """
    found = predictions_file(folder)
    if found is None:
        raise FileNotFoundError(f"{folder} has no detections")
    path, rules = found
    json_file = metadata.get("json_file") or str(folder / f"{dataset}_coco_format.json")
    truth = GroundTruth.read(str(json_file), rules)
    try:
        detections = Detections.from_json(json.loads(read_text(path)))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a list of detections ({error})") from error
    masks = detections.masks is not None
    task, limit = "segm" if masks else "bbox", DEFAULT_MAX_DETS[rules]
    evaluation = HotcocoBackend(truth, rules).evaluation(detections, task, limit)
    arrays: Any = evaluation.eval
    table = PrecisionTable(arrays["precision"][..., -1], arrays["recall"][..., -1], truth.categories)
    counts = Counter(row["category_id"] for row in truth.annotations if not row["iscrowd"])
    classes = [_class_score(table, k, counts[k + 1]) for k in range(len(truth.categories))]
    confusion = evaluation.confusion_matrix(0.5, limit, min_score)
    errors = evaluation.tide_errors(0.5, 0.1)
    ids = {number: image_id for image_id, number in truth.image_numbers.items()}
    diagnosis = evaluation.image_diagnostics(0.5)["img_summary"]
    return Analysis(
        dataset,
        "masks" if masks else "boxes",
        _metrics(table),
        "AP",
        classes,
        np.asarray(confusion["matrix"], np.int64),
        [*(str(c["name"]) for c in truth.categories), "no object"],
        f"Detections of score {min_score:g} or higher, matched to objects of any class at IoU 0.5; the last "
        "row is detections without an object, the last column objects without a detection.",
        {ids[number]: 100 * row["ap"] for number, row in diagnosis.items() if row["tp"] + row["fn"]},
        partial(_output, _by_image(detections), metadata, min_score, _sizes(truth, ids)),
        _bootstrap,
        _breakdowns(table, truth, classes),
        {f"IoU {iou:.2f}": _mean_precision(table, t) for t, iou in ((0, 0.5), (5, 0.75), (8, 0.9))},
        [
            (text, 100 * errors["delta_ap"][name], errors["counts"].get(name))
            for name, text in _ERRORS.items()
        ],
        evaluation,
    )


def _metrics(table: PrecisionTable) -> dict[str, float]:
    return {
        "AP": table.ap(),
        "AP50": table.ap(0.5),
        "AP75": table.ap(0.75),
        "APs": table.ap(area="small"),
        "APm": table.ap(area="medium"),
        "APl": table.ap(area="large"),
    }


def _class_score(table: PrecisionTable, k: int, count: int) -> ClassScore:
    category = table.categories[k]
    recall = table.recall[0, k, 0]
    others = {
        "AP50": table.ap(0.5, category_ids=[category["id"]]),
        "recall at IoU 0.5": 100 * float(recall) if recall > -1 else float("nan"),
    }
    return ClassScore(str(category["name"]), count, table.ap(category_ids=[category["id"]]), others)


def _mean_precision(table: PrecisionTable, threshold: int) -> Any:
    """Return precision (101,) at an IoU threshold, the mean over the classes with ground truth."""
    precision = table.precision[threshold, :, :, 0]
    known = precision[:, (precision > -1).all(0)]
    return known.mean(1) if known.size else np.full(len(precision), np.nan)


def _breakdowns(
    table: PrecisionTable, truth: GroundTruth, classes: list[ClassScore]
) -> dict[str, tuple[list[str], list[list[Cell]]]]:
    areas = np.array([row["area"] for row in truth.annotations if not row["iscrowd"]])
    sizes: list[list[Cell]] = [
        ["small, below 32\u00b2 pixels", int((areas < 32**2).sum()), table.ap(area="small")],
        ["medium", int(((areas >= 32**2) & (areas < 96**2)).sum()), table.ap(area="medium")],
        ["large, from 96\u00b2 pixels", int((areas >= 96**2).sum()), table.ap(area="large")],
    ]
    groups: dict[str, list[int]] = {}
    names = {"r": "rare", "c": "common", "f": "frequent"}
    if all(category.get("frequency") in names for category in truth.categories):
        for k, category in enumerate(truth.categories):
            groups.setdefault(f"{names[category['frequency']]} (of the dataset)", []).append(k)
    else:
        order = sorted((k for k, row in enumerate(classes) if row.count), key=lambda k: classes[k].count)
        parts = np.array_split(np.array(order, int), 3)
        groups = {
            f"{name} third of the classes": part.tolist()
            for name, part in zip(("rarest", "middle", "most frequent"), parts, strict=True)
            if len(part)
        }
    frequency: list[list[Cell]] = []
    for name, members in groups.items():
        ids = [truth.categories[k]["id"] for k in members]
        frequency.append([name, len(ids), sum(classes[k].count for k in members), table.ap(category_ids=ids)])
    return {
        "Size of the object": (["size", "objects", "AP"], sizes),
        "Frequency of the class": (["classes", "number", "objects", "AP"], frequency),
    }


def _sizes(truth: GroundTruth, ids: Mapping[int, Any]) -> dict[Any, tuple[int, int]]:
    return {ids[row["id"]]: (row["height"], row["width"]) for row in truth.images}


def _by_image(detections: Detections) -> dict[Any, list[dict[str, Any]]]:
    found: dict[Any, list[dict[str, Any]]] = {}
    for row in detections.to_json():
        found.setdefault(row["image_id"], []).append(row)
    return found


def _output(
    rows: Mapping[Any, list[dict[str, Any]]],
    metadata: Any,
    min_score: float,
    sizes: Mapping[Any, tuple[int, int]],
    image: Any,
) -> dict[str, Any]:
    """Return the detections of an image as the output of a model."""
    known = metadata.get("thing_dataset_id_to_contiguous_id") or {}
    shown = [row for row in rows.get(image, ()) if row["score"] >= min_score]
    boxes = torch.tensor([row["bbox"] for row in shown]).reshape(-1, 4)
    instances = Instances(
        sizes[image],
        pred_boxes=Boxes(torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], dim=1)),
        scores=torch.tensor([row["score"] for row in shown]),
        pred_classes=torch.tensor(
            [known.get(row["category_id"], row["category_id"]) for row in shown], dtype=torch.int64
        ),
    )
    if shown and "segmentation" in shown[0]:
        masks = np.stack([mask_util.decode(row["segmentation"]) for row in shown])
        instances.pred_masks = torch.from_numpy(masks) > 0
    return {"instances": instances}


def _bootstrap(first: Analysis, other: Analysis, samples: int) -> dict[str, Interval]:
    """Compare AP by resampling images: the same images for both runs."""
    found = hotcoco.compare(first.details, other.details, n_bootstrap=samples, seed=0, confidence=0.95)
    intervals = {}
    for name, value in first.metrics.items():
        limits = (found["ci"] or {}).get(name)
        low, high = (100 * limits["lower"], 100 * limits["upper"]) if limits else (float("nan"),) * 2
        if not np.isfinite(value):
            low = high = float("nan")
        intervals[name] = Interval(value, other.metrics[name], low, high)
    return intervals
