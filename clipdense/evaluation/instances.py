"""AP of boxes and instance masks: COCO, LVIS, and own data in COCO's format."""

from __future__ import annotations

import logging
import os
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

from clipdense.evaluation.average_precision import (
    DEFAULT_MAX_DETS,
    PrecisionTable,
    Rules,
    average_precision_backend,
)
from clipdense.evaluation.base import Results, TaskEvaluator, distinct_names
from clipdense.evaluation.detections import Detections
from clipdense.evaluation.groups import class_groups

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.coco import convert_to_coco_json
from detectron2.utils.file_io import PathManager
from detectron2.utils.logger import create_small_table

__all__ = ["InstanceEvaluator"]

logger = logging.getLogger(__name__)


class InstanceEvaluator(TaskEvaluator):
    """AP of ``"instances"`` under COCO's or LVIS's rules, with Detectron2's result keys.

    Results are ``{"bbox": {"AP", "AP50", "AP75", "APs", "APm", "APl"}, "segm": {...}}`` in percent,
    ``"segm"`` if the model predicts masks. LVIS adds ``APr, APc, APf`` (rare, common, frequent classes).
    Each group of classes in the metadata (see `class_groups`) adds ``AP_<group>`` and ``AP50_<group>``, the
    mean over its classes with ground truth; OV-COCO reports ``AP50_novel``. `per_class` adds ``AP-<class>``;
    classes that share a name are told apart by their ids, as in ``AP-pothole (id 0)``.

    The detections are written to ``coco_instances_results.json`` (or ``lvis_...``) in COCO's result format.
    If the annotation file has no annotations (test splits), all metrics are NaN.

    Args:
        dataset_name: registered dataset. Its annotations are the metadata's ``json_file``; without one, they
            are converted from Detectron2's standard dicts.
        rules: "coco" or "lvis".
        output_dir: folder for the detections; None writes nothing.
        backend: "hotcoco" or "reference".
        max_dets: limit on detections, the best scores first: per image and class (COCO) or per image (LVIS);
            0: the limit of the benchmark.
        per_class: whether to report each class.
    """

    outputs = ("instances",)

    def __init__(
        self,
        dataset_name: str,
        rules: Rules = "coco",
        output_dir: str | None = None,
        *,
        backend: str = "hotcoco",
        max_dets: int = 0,
        per_class: bool = False,
        distributed: bool = True,
        optional: bool = False,
    ) -> None:
        super().__init__(output_dir, distributed=distributed, optional=optional)
        self._name = dataset_name
        self._rules: Rules = rules
        self._max_dets = max_dets or DEFAULT_MAX_DETS[rules]
        self._per_class = per_class
        metadata = MetadataCatalog.get(dataset_name)
        if not metadata.get("thing_classes"):
            DatasetCatalog.get(dataset_name)  # reading a COCO file fills in its classes
        self._backend = average_precision_backend(backend, _annotation_file(dataset_name, output_dir), rules)
        self._category_ids = _category_ids(metadata, rules)
        names: Sequence[str] = metadata.get("thing_classes") or ()
        self._class_names = {self._category_ids[i]: n for i, n in enumerate(names) if i in self._category_ids}
        groups = class_groups(metadata, names)
        self._groups = {
            group: {self._category_ids[i] for i in classes if i in self._category_ids}
            for group, classes in groups.items()
        }

    def process_image(self, sample: dict[str, Any], output: dict[str, Any]) -> Detections:
        """Convert the detections of an image."""
        image_id = sample["image_id"]
        if image_id not in self._backend.image_ids:
            raise ValueError(f"image {image_id!r} is not in the annotations of '{self._name}'")
        return Detections.from_instances(output["instances"], image_id, self._category_id)

    def score(self, records: list[Detections]) -> Results:
        """Compute AP of boxes, and of masks if there are any."""
        detections = Detections.concatenate(records)
        if not len(detections):
            logger.warning("%s: the model detected nothing", self._name)
        if self._output_dir:
            self.save(f"{self._rules}_instances_results.json", detections.to_json())
        results: Results = OrderedDict()
        for task in ("bbox",) if detections.masks is None else ("bbox", "segm"):
            table = self._backend.table(detections, task, self._max_dets)
            results[task] = self._metrics(table)
            logger.info("%s, %s:\n%s", self._name, task, create_small_table(results[task]))
            if self._per_class:
                ids = [c["id"] for c in table.categories]
                names = distinct_names(map(self._display_name, table.categories), ids)
                values = [(n, table.ap(category_ids=[i])) for n, i in zip(names, ids, strict=True)]
                results[task].update({f"AP-{name}": ap for name, ap in values})
        return results

    def _metrics(self, table: PrecisionTable) -> dict[str, float]:
        metrics = {
            "AP": table.ap(),
            "AP50": table.ap(0.5),
            "AP75": table.ap(0.75),
            "APs": table.ap(area="small"),
            "APm": table.ap(area="medium"),
            "APl": table.ap(area="large"),
        }
        if self._rules == "lvis":
            for frequency in "rcf":
                ids = {c["id"] for c in table.categories if c.get("frequency") == frequency}
                metrics[f"AP{frequency}"] = table.ap(category_ids=ids)
        for group, ids in self._groups.items():
            metrics[f"AP_{group}"] = table.ap(category_ids=ids)
            metrics[f"AP50_{group}"] = table.ap(0.5, category_ids=ids)
        return metrics

    def _category_id(self, predicted: int) -> int | str:
        try:
            return self._category_ids[predicted]
        except KeyError:
            known = len(self._category_ids)
            raise ValueError(
                f"the model predicts class {predicted}, but '{self._name}' has {known} thing classes; "
                "check MODEL.ROI_HEADS.NUM_CLASSES, or the vocabulary"
            ) from None

    def _display_name(self, category: Mapping[str, Any]) -> str:
        return self._class_names.get(category["id"], str(category["name"]))


def _annotation_file(dataset_name: str, output_dir: str | None) -> str:
    """Return the local path of a dataset's annotations in COCO's format; without a file, write one."""
    metadata = MetadataCatalog.get(dataset_name)
    if metadata.get("json_file"):
        return str(PathManager.get_local_path(metadata.json_file))
    if output_dir is None:
        raise ValueError(
            f"'{dataset_name}' has no annotation file (metadata json_file): set output_dir, where one is "
            "written from its dicts"
        )
    path = os.path.join(output_dir, f"{dataset_name}_coco_format.json")
    convert_to_coco_json(dataset_name, path)
    return path


def _category_ids(metadata: Any, rules: Rules) -> dict[int, int | str]:
    """Map predicted classes to category ids."""
    if mapping := metadata.get("thing_dataset_id_to_contiguous_id"):
        return {contiguous: category_id for category_id, contiguous in mapping.items()}
    # LVIS counts from 1; `convert_to_coco_json` writes the classes unchanged
    first = 1 if rules == "lvis" else 0
    return {i: i + first for i in range(len(metadata.thing_classes))}
