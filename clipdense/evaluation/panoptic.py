"""Panoptic quality."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from tabulate import tabulate

from clipdense.data.image import read_labels
from clipdense.data.validation import read_coco
from clipdense.evaluation.base import Results, TaskEvaluator, distinct_names, save_json
from clipdense.evaluation.groups import class_groups

from detectron2.data import MetadataCatalog
from detectron2.utils.file_io import PathManager

__all__ = ["PANOPTIC_BACKENDS", "Matches", "PanopticEvaluator", "panoptic_quality"]

logger = logging.getLogger(__name__)


@dataclass
class Matches:
    """Segments of a class.

    Attributes:
        iou: sum of the IoU of matched segments.
        tp: matched segments (IoU > 0.5).
        fp: predicted segments without a match.
        fn: ground-truth segments without a match.
    """

    iou: float = 0.0
    tp: int = 0
    fp: int = 0
    fn: int = 0


Id = int | str
Record = tuple[Any, bytes, list[dict[str, Any]]]


def panoptic_quality(matches: Collection[Matches]) -> tuple[float, float, float]:
    """Compute PQ, SQ and RQ in percent (Kirillov et al., Panoptic Segmentation, arXiv:1801.00868, section 4).

    They are means over the classes that are labelled or predicted somewhere; NaN if there are none.
    """
    occurring = [m for m in matches if m.tp + m.fp + m.fn]
    if not occurring:
        return float("nan"), float("nan"), float("nan")
    size = np.array([m.tp + 0.5 * m.fp + 0.5 * m.fn for m in occurring])
    iou, tp = np.array([m.iou for m in occurring]), np.array([m.tp for m in occurring])
    sq = np.divide(iou, tp, out=np.zeros_like(iou), where=tp > 0)
    return 100 * float((iou / size).mean()), 100 * float(sq.mean()), 100 * float((tp / size).mean())


class PanopticEvaluator(TaskEvaluator):
    """PQ of ``"panoptic_seg"``, with Detectron2's result keys.

    Results are ``{"panoptic_seg": {"PQ", "SQ", "RQ", "PQ_th", ..., "RQ_st"}}`` in percent: all, things,
    stuff. Groups of classes in the metadata add ``PQ_<group>``; `per_class` adds ``PQ-<class>``. Both
    backends count the same matches. An image without a prediction counts as all void (panopticapi raises an
    error), and a dataset without things or without stuff has NaN for them (panopticapi divides by zero).

    The predictions are written to ``panoptic_predictions.json`` and ``panoptic/*.png`` in COCO's format.

    Args:
        dataset_name: registered dataset with ``panoptic_json`` and ``panoptic_root`` in its metadata.
        output_dir: folder for the predictions; None writes nothing.
        backend: "hotcoco" or "reference" (panopticapi).
        per_class: whether to report each class.
    """

    outputs = ("panoptic_seg",)

    def __init__(
        self,
        dataset_name: str,
        output_dir: str | None = None,
        *,
        backend: str = "hotcoco",
        per_class: bool = False,
        distributed: bool = True,
        optional: bool = False,
    ) -> None:
        super().__init__(output_dir, distributed=distributed, optional=optional)
        if backend not in PANOPTIC_BACKENDS:
            raise ValueError(f"TEST.METRIC_BACKEND is {backend!r}; expected {', '.join(PANOPTIC_BACKENDS)}")
        self._name = dataset_name
        self._match = PANOPTIC_BACKENDS[backend]
        self._per_class = per_class
        self._metadata = metadata = MetadataCatalog.get(dataset_name)
        self._category_ids = {
            True: {c: i for i, c in metadata.thing_dataset_id_to_contiguous_id.items()},
            False: {c: i for i, c in metadata.stuff_dataset_id_to_contiguous_id.items()},
        }
        self._json = PathManager.get_local_path(metadata.panoptic_json)
        # rejects label maps outside the dataset's folder, whose names are also those of written predictions
        ground_truth, report = read_coco(self._json, "panoptic", image_names_required=False)
        report.raise_errors()
        self._annotations = ground_truth["annotations"]
        self._files = {a["image_id"]: a["file_name"] for a in ground_truth["annotations"]}
        self._sizes = {i["id"]: (i["height"], i["width"]) for i in ground_truth["images"]}
        self._categories = ground_truth["categories"]
        ids = [c["id"] for c in self._categories]
        self._known = frozenset(ids)
        groups = class_groups(metadata, [c["name"] for c in self._categories])
        self._groups = {group: {ids[i] for i in classes} for group, classes in groups.items()}

    def process_image(self, sample: dict[str, Any], output: dict[str, Any]) -> Record:
        """Convert a prediction to the image id, a PNG file of segment ids, and their categories."""
        image_id = sample["image_id"]
        if image_id not in self._files:
            raise ValueError(f"image {image_id!r} is not in the panoptic annotations of '{self._name}'")
        segmentation, segments = output["panoptic_seg"]
        ids = segmentation.cpu().numpy().astype(np.int64)
        if segments is None:
            ids, segments = self._decode(ids)
        present = set(np.unique(ids).tolist()) - {0}
        if unknown := present - {s["id"] for s in segments}:
            raise ValueError(
                f"image {image_id!r}: the map has segments {sorted(unknown)[:5]} that segments_info lacks"
            )
        kept = [
            {"id": int(s["id"]), "category_id": self._category_id(s)} for s in segments if s["id"] in present
        ]
        if present and not 0 < min(present) <= max(present) < _MAX_ID:
            ids, kept = _renumber(ids, kept)
        return image_id, _png(ids), kept

    def score(self, records: list[Record]) -> Results:
        """Compute PQ, SQ and RQ of all classes, things and stuff, and PQ of the groups."""
        with tempfile.TemporaryDirectory(prefix="clipdense_panoptic_") as scratch:
            folder = Path(self._output_dir or scratch) / "panoptic"
            predictions = self._write(records, folder)
            path = str(folder.parent / "panoptic_predictions.json")
            save_json(path, {"annotations": predictions, "categories": self._categories})
            root = PathManager.get_local_path(self._metadata.panoptic_root)
            matches = self._match_numbered(predictions, root, folder, Path(scratch))
        metrics: dict[str, float] = {}
        things = {c["id"] for c in self._categories if c["isthing"]}
        for suffix, ids in {"": set(matches), "_th": things, "_st": set(matches) - things}.items():
            quality = panoptic_quality([matches[i] for i in ids])
            metrics.update(zip((f"PQ{suffix}", f"SQ{suffix}", f"RQ{suffix}"), quality, strict=True))
        for group, ids in self._groups.items():
            metrics[f"PQ_{group}"] = panoptic_quality([matches[i] for i in ids])[0]
        rows = [[k, *(metrics[f"{m}{s}"] for m in ("PQ", "SQ", "RQ"))] for k, s in _ROWS]
        logger.info("%s:\n%s", self._name, tabulate(rows, ["", "PQ", "SQ", "RQ"], "pipe", floatfmt=".2f"))
        if self._per_class:
            order = [c["id"] for c in self._categories]
            names = distinct_names([c["name"] for c in self._categories], order)
            values = [(n, panoptic_quality([matches[i]])[0]) for n, i in zip(names, order, strict=True)]
            metrics.update({f"PQ-{name}": value for name, value in values})
        return OrderedDict(panoptic_seg=metrics)

    def _match_numbered(
        self, predictions: list[dict[str, Any]], root: str, folder: Path, scratch: Path
    ) -> dict[Id, Matches]:
        """Match predictions with the ground truth; images and categories are numbered for the libraries."""
        images = {image_id: number for number, image_id in enumerate(self._files, 1)}
        numbers = {category["id"]: number for number, category in enumerate(self._categories, 1)}
        categories = [{**c, "id": numbers[c["id"]], "isthing": int(c["isthing"])} for c in self._categories]
        listed = [
            {"id": number, "file_name": "", "height": self._sizes[i][0], "width": self._sizes[i][1]}
            for i, number in images.items()
        ]

        def numbered(annotation: dict[str, Any]) -> dict[str, Any]:
            segments = [s | {"category_id": numbers[s["category_id"]]} for s in annotation["segments_info"]]
            return annotation | {"image_id": images[annotation["image_id"]], "segments_info": segments}

        paths = []
        truth = [_complete(annotation, Path(root)) for annotation in self._annotations]
        for name, content in (("truth", truth), ("predictions", predictions)):
            path = scratch / f"{name}.json"
            rows = [numbered(annotation) for annotation in content]
            save_json(str(path), {"images": listed, "annotations": rows, "categories": categories})
            paths.append(str(path))
        matches = self._match(paths[0], root, paths[1], str(folder))
        return {category_id: matches[number] for category_id, number in numbers.items()}

    def _write(self, records: list[Record], folder: Path) -> list[dict[str, Any]]:
        """Write the PNG files; return their annotations in COCO's format."""
        predicted = {image_id: (png, segments) for image_id, png, segments in records}
        missing = self._files.keys() - predicted.keys()
        if missing:
            logger.warning(
                "%s: %d of %d images without prediction", self._name, len(missing), len(self._files)
            )
        annotations = []
        for image_id, file_name in self._files.items():
            if image_id in missing:
                predicted[image_id] = (_png(np.zeros(self._sizes[image_id], np.int64)), [])
            png, segments = predicted[image_id]
            path = folder / file_name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(png)
            annotations.append({"image_id": image_id, "file_name": file_name, "segments_info": segments})
        return annotations

    def _decode(self, ids: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], list[dict[str, Any]]]:
        """Convert pixels class * label_divisor + instance (-1: void) to segment ids and segments_info."""
        things = self._category_ids[True]
        segments = [
            {"id": label + 1, "category_id": label // self._metadata.label_divisor}
            for label in np.unique(ids).tolist()
            if label >= 0
        ]
        return ids + 1, [{**s, "isthing": s["category_id"] in things} for s in segments]

    def _category_id(self, segment: dict[str, Any]) -> Id:
        if "isthing" not in segment:  # the model gives category ids of the dataset
            category_id: Id = segment["category_id"]
            if category_id not in self._known:
                raise ValueError(f"the model predicts category {category_id!r}, which '{self._name}' lacks")
            return category_id
        ids = self._category_ids[bool(segment["isthing"])]
        if segment["category_id"] not in ids:
            kind = "thing" if segment["isthing"] else "stuff"
            raise ValueError(
                f"the model predicts {kind} class {segment['category_id']}, which '{self._name}' lacks"
            )
        return ids[segment["category_id"]]


_MAX_ID = 2**24
"""Ids of segments are stored in the three bytes of a colour."""

_ROWS = (("all", ""), ("things", "_th"), ("stuff", "_st"))


def _renumber(
    ids: npt.NDArray[np.int64], segments: list[dict[str, Any]]
) -> tuple[npt.NDArray[np.int64], list[dict[str, Any]]]:
    """Number segments from 1, for ids that a PNG file cannot hold."""
    values, inverse = np.unique(ids, return_inverse=True)
    numbers = {segment["id"]: number for number, segment in enumerate(segments, 1)}
    table = np.array([numbers.get(value, 0) for value in values.tolist()], np.int64)
    return table[inverse].reshape(ids.shape), [s | {"id": numbers[s["id"]]} for s in segments]


def _complete(annotation: dict[str, Any], root: Path) -> dict[str, Any]:
    """Add the areas and crowd flags that segments of the ground truth lack; areas come from the label map."""
    segments = annotation["segments_info"]
    areas: dict[int, int] = {}
    if any("area" not in segment for segment in segments):
        values, counts = np.unique(read_labels(root / annotation["file_name"]), return_counts=True)
        areas = dict(zip(values.tolist(), counts.tolist(), strict=True))
    return annotation | {
        "segments_info": [{"iscrowd": 0, "area": areas.get(s["id"], 0), **s} for s in segments]
    }


def _png(ids: npt.NDArray[np.int64]) -> bytes:
    """Encode segment ids as a PNG, id = R + 256 G + 65536 B."""
    colours = np.stack([ids >> shift & 255 for shift in (0, 8, 16)], axis=-1).astype(np.uint8)
    with io.BytesIO() as buffer:
        Image.fromarray(colours).save(buffer, format="PNG")
        return buffer.getvalue()


def _match_hotcoco(gt_json: str, gt_root: str, pred_json: str, pred_root: str) -> dict[int, Matches]:
    from hotcoco.panoptic import PanopticEval

    evaluation = PanopticEval(gt_json, pred_json, gt_folder=gt_root, pred_folder=pred_root)
    evaluation.evaluate()
    per_class = evaluation.results()["per_class"]
    return {i: Matches(c["iou"], c["tp"], c["fp"], c["fn"]) for i, c in per_class.items()}


def _match_panopticapi(gt_json: str, gt_root: str, pred_json: str, pred_root: str) -> dict[int, Matches]:
    from panopticapi.evaluation import pq_compute_single_core

    ground_truth, prediction = (json.loads(Path(path).read_text()) for path in (gt_json, pred_json))
    categories = {c["id"]: c for c in ground_truth["categories"]}
    predicted = {a["image_id"]: a for a in prediction["annotations"]}
    pairs = [(a, predicted[a["image_id"]]) for a in ground_truth["annotations"]]
    with contextlib.redirect_stdout(io.StringIO()):
        counts = pq_compute_single_core(0, pairs, gt_root, pred_root, categories)
    return {i: Matches(float(counts[i].iou), counts[i].tp, counts[i].fp, counts[i].fn) for i in categories}


PANOPTIC_BACKENDS: dict[str, Callable[[str, str, str, str], dict[int, Matches]]] = {
    "hotcoco": _match_hotcoco,
    "reference": _match_panopticapi,
}
