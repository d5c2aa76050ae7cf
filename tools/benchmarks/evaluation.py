"""Suite ``evaluation``: our evaluators beside the reference libraries, on synthetic data.

``eval/coco5000``: AP of boxes and masks on 5,000 images, from the annotation file and a list of results to
the metrics: speed-up of the default backend over pycocotools. Both must give the same numbers.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import tempfile
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as mask_utils
from tqdm import tqdm

from benchmarks import MIN_PAIRS, Row, wall
from clipdense.evaluation.average_precision import PrecisionTable, average_precision_backend
from clipdense.evaluation.detections import Detections

__all__ = ["REDUCED", "add_arguments", "hotcoco_metrics", "pycocotools_metrics", "rows", "synthetic_coco"]

REDUCED: tuple[str, ...] = ("--images", "100")
"""Options of this suite in a reduced run of all suites."""

HEIGHT, WIDTH, CLASSES = 480, 640, 80
OBJECTS, DETECTIONS = 7.3, 36
"""Means per image: objects as in COCO, detections as of a Mask R-CNN."""

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
Metrics = dict[str, dict[str, float]]


def add_arguments(parser: ArgumentParser) -> None:
    """Add the options of the suite."""
    parser.add_argument("--images", type=int, default=5000, help="number of images (default: %(default)s)")
    parser.add_argument(
        "--pairs", type=int, help="number of pairs of runs (default: 7; 2 for 2,500 images or more)"
    )


def rows(args: Namespace) -> Iterator[Row]:
    """Measure the rows of the suite."""
    pairs = args.pairs or (MIN_PAIRS if args.images < 2500 else 2)
    dataset, results = synthetic_coco(args.images)
    with tempfile.TemporaryDirectory(prefix="clipdense_benchmark_") as folder:
        file = str(Path(folder) / "instances.json")
        Path(file).write_text(json.dumps(dataset))
        ours, reference = hotcoco_metrics(file, results), {}

        def run_reference() -> None:
            reference.update(pycocotools_metrics(file, results))

        row = wall(
            f"eval/coco{args.images}",
            lambda: hotcoco_metrics(file, results),
            run_reference,
            pairs=pairs,
            kind="speedup",
            what="hotcoco | pycocotools",
            warm_up=args.images < 2500,
            notes=f"{args.images} images, {len(dataset['annotations'])} objects, {len(results)} detections.",
        )
    _assert_equal(ours, reference)
    row.values = {"images": args.images, "ours": ours, "other": reference}
    row.notes += "".join(
        f"\n  {task:5}{who:12}" + "  ".join(f"{name} {value:.10f}" for name, value in metrics[task].items())
        for task in ours
        for who, metrics in (("hotcoco", ours), ("pycocotools", reference))
    )
    yield row


def hotcoco_metrics(json_file: str, results: list[dict[str, Any]]) -> Metrics:
    """Compute the metrics as `InstanceEvaluator` does, including the conversion from dictionaries."""
    backend = average_precision_backend("hotcoco", json_file, "coco")
    detections = Detections.from_json(results)
    return {task: _summary(backend.table(detections, task, 100)) for task in ("bbox", "segm")}


def pycocotools_metrics(json_file: str, results: list[dict[str, Any]]) -> Metrics:
    """Compute the metrics as Detectron2's `COCOEvaluator` does with ``use_fast_impl=False``."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    metrics: Metrics = {}
    with contextlib.redirect_stdout(io.StringIO()):
        ground_truth = COCO(json_file)
        for task in ("bbox", "segm"):
            dropped = "bbox" if task == "segm" else ""
            rows = [{key: value for key, value in row.items() if key != dropped} for row in results]
            evaluation = COCOeval(ground_truth, ground_truth.loadRes(rows), task)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
            metrics[task] = {name: 100 * float(v) for name, v in zip(METRICS, evaluation.stats, strict=False)}
    return metrics


def _summary(table: PrecisionTable) -> dict[str, float]:
    values = (
        table.ap(),
        table.ap(0.5),
        table.ap(0.75),
        *(table.ap(area=a) for a in ("small", "medium", "large")),
    )
    return dict(zip(METRICS, values, strict=True))


def _assert_equal(ours: Metrics, other: Metrics) -> None:
    for task, metrics in other.items():
        for name, value in metrics.items():
            if not math.isclose(ours[task][name], value, rel_tol=0, abs_tol=1e-9):
                raise AssertionError(f"{task} {name}: hotcoco {ours[task][name]!r}, pycocotools {value!r}")


def synthetic_coco(images: int, seed: int = 0) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Make a COCO dataset of blobs, and detections of a mediocre detector.

    Half of the detections are displaced copies of objects, a fifth of these with another class; the others
    are at random places. Scores have three digits, so that many tie; 2% of the objects are crowds; some
    images have no objects.

    Returns:
        The annotation file's content, with polygons, and a list in COCO's result format, with run-length
        encodings.
    """
    rng = np.random.default_rng(seed)
    dataset: dict[str, Any] = {
        "images": [
            {"id": i, "width": WIDTH, "height": HEIGHT, "file_name": f"{i}.jpg"} for i in range(1, images + 1)
        ],
        "categories": [{"id": i, "name": f"class {i}"} for i in range(1, CLASSES + 1)],
        "annotations": [],
    }
    results = []
    for image_id in tqdm(range(1, images + 1), "synthetic images", disable=None, leave=False):
        objects = [_blob(rng) for _ in range(rng.poisson(OBJECTS))]
        for blob in objects:
            dataset["annotations"].append(_annotation(rng, blob, image_id, len(dataset["annotations"]) + 1))
        for _ in range(rng.poisson(DETECTIONS)):
            found = bool(objects) and rng.random() < 0.5
            blob = _displace(rng, objects[rng.integers(len(objects))]) if found else _blob(rng)
            score = rng.beta(4, 2) if found else rng.beta(1, 5)
            results.append(_result(blob, image_id, round(float(score), 3)))
    return dataset, results


Blob = tuple[np.ndarray, int]  # centre and half size (x, y, a, b) with 16 radii, and the class
_ANGLES = np.linspace(0, 2 * np.pi, 16, endpoint=False)


def _blob(rng: np.random.Generator) -> Blob:
    size = np.exp(rng.uniform(np.log(6), np.log(150)))
    shape = np.exp(rng.normal(0, 0.3))
    place = rng.uniform(0, (WIDTH, HEIGHT))
    radii = 1 - 0.2 * rng.random(len(_ANGLES))
    return np.concatenate([place, [size * shape, size / shape], radii]), int(rng.integers(1, CLASSES + 1))


def _displace(rng: np.random.Generator, blob: Blob) -> Blob:
    values, label = blob[0].copy(), blob[1]
    values[:2] += rng.normal(0, 0.1, 2) * values[2:4]
    values[2:4] *= np.exp(rng.normal(0, 0.1, 2))
    return values, label if rng.random() < 0.8 else int(rng.integers(1, CLASSES + 1))


def _polygon(blob: Blob) -> list[float]:
    values = blob[0]
    x = (values[0] + values[2] * values[4:] * np.cos(_ANGLES)).clip(0, WIDTH)
    y = (values[1] + values[3] * values[4:] * np.sin(_ANGLES)).clip(0, HEIGHT)
    return [float(v) for v in np.stack([x, y], axis=1).reshape(-1).round(2)]


def _annotation(rng: np.random.Generator, blob: Blob, image_id: int, id: int) -> dict[str, Any]:
    polygon = _polygon(blob)
    rle = mask_utils.frPyObjects([polygon], HEIGHT, WIDTH)[0]
    return {
        "id": id,
        "image_id": image_id,
        "category_id": blob[1],
        "bbox": mask_utils.toBbox(rle).tolist(),
        "area": float(mask_utils.area(rle)),
        "iscrowd": int(rng.random() < 0.02),
        "segmentation": [polygon],
    }


def _result(blob: Blob, image_id: int, score: float) -> dict[str, Any]:
    rle = mask_utils.frPyObjects([_polygon(blob)], HEIGHT, WIDTH)[0]
    return {
        "image_id": image_id,
        "category_id": blob[1],
        "bbox": mask_utils.toBbox(rle).tolist(),
        "score": score,
        "segmentation": {"size": rle["size"], "counts": rle["counts"].decode()},
    }
