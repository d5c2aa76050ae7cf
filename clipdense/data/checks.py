"""Checks before training: dataset names, class lists against heads, boxes against images."""

import difflib
import logging
from collections.abc import Sequence
from typing import Any

from clipdense.data.heads import config_value, head_classes
from clipdense.data.validation import DataError, check_datasets, read_categories

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode

__all__ = [
    "check_classes",
    "check_dataset_names",
    "check_named_datasets",
    "clean_annotations",
    "dataset_classes",
    "drop_objects_without_mask",
    "mark_objects_without_mask",
]

logger = logging.getLogger(__name__)


def check_dataset_names(names: Sequence[str]) -> None:
    """Check that every dataset is registered.

    Raises:
        ValueError: If there is no name, or one is not registered; suggests similar names.
    """
    if not names:
        raise ValueError("no dataset is given: set DATASETS.TRAIN and DATASETS.TEST")
    known = DatasetCatalog.list()
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=4, cutoff=0.5)
            hint = f"Did you mean {', '.join(near)}?" if near else "No registered name is similar."
            raise ValueError(
                f"dataset {name!r} is not registered. {hint} List your own data in DATASETS.COCO_JSON, "
                "COCO_PANOPTIC, LABEL_MAPS, YOLO or VOC, or images without annotations in IMAGES (in your "
                "own program, then call clipdense.data.datasets.own.register_from_config)."
            )


def check_named_datasets(names: Sequence[str]) -> None:
    """Check the datasets that a tool was given: registered, and with sound files; log what was noticed.

    Raises:
        ValueError: If there is no name, one is not registered, or a file has a fault that would make results
            wrong.
        FileNotFoundError: If an annotation file or an image folder is missing.
    """
    check_dataset_names(names)
    for message in check_datasets(names):
        logger.warning("%s", message)


def check_classes(cfg: CfgNode) -> None:
    """Check that all datasets of a config have one class list, and that it fits closed-vocabulary heads.

    Raises:
        ValueError: If class lists differ, or a head has another number of classes; names both.
    """
    names = [*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST]
    check_dataset_names(names)
    for head in head_classes(cfg):
        key, kind, count = head.key, head.kind, config_value(cfg, head.key)
        lists = {name: dataset_classes(name, kind) for name in names}
        for name, classes in lists.items():
            if classes is None:
                raise ValueError(
                    f"dataset {name} has no {kind} classes, which {cfg.MODEL.META_ARCHITECTURE} needs"
                )
            if len(classes) != count:
                raise ValueError(
                    f"{key} = {count}, but dataset {name} has {len(classes)} {kind} classes "
                    f"({', '.join(classes[:5])}{', ...' if len(classes) > 5 else ''}). "
                    f"Set {key} {len(classes)}, or choose another dataset."
                )
            first = lists[names[0]] or []
            if classes != first:
                at = next(i for i, (a, b) in enumerate(zip(first, classes, strict=True)) if a != b)
                raise ValueError(
                    f"datasets {names[0]} and {name} differ in class {at}: {first[at]!r}, {classes[at]!r}. "
                    f"{cfg.MODEL.META_ARCHITECTURE} has one fixed class list."
                )


def dataset_classes(name: str, kind: str) -> list[str] | None:
    """Return the names of a dataset's classes; None if its metadata have none.

    `register_coco_instances` sets them only when the data are loaded; until then they are read from the JSON
    file.

    Args:
        name: of the dataset.
        kind: "thing" or "stuff".
    """
    metadata = MetadataCatalog.get(name)
    classes = metadata.get(f"{kind}_classes")
    if classes is None and kind == "thing" and metadata.get("evaluator_type") == "coco":
        return [category["name"] for category in read_categories(metadata.json_file)]
    if classes is None:
        return None
    things = metadata.get("thing_dataset_id_to_contiguous_id")
    if kind == "thing" and things and metadata.get("stuff_classes") == classes:
        # standard panoptic metadata have every class in both lists
        return [c for i, c in enumerate(classes) if i in set(things.values())]
    return list(classes)


def clean_annotations(dataset: Any) -> Any:
    """Clip boxes to their images and drop boxes without area; log how many, and the first image with one.

    Args:
        dataset: dataset dicts, changed in place; anything else is returned unchanged.
    """
    if not isinstance(dataset, list):
        return dataset
    clipped, dropped = [], []
    for record in dataset:
        if not record.get("annotations") or "width" not in record:
            continue
        kept = []
        for annotation in record["annotations"]:
            mode = annotation["bbox_mode"]
            if mode in (BoxMode.XYXY_ABS, BoxMode.XYWH_ABS):
                box = BoxMode.convert(list(annotation["bbox"]), mode, BoxMode.XYXY_ABS)
                limits = (record["width"], record["height"]) * 2
                inside = [min(max(v, 0.0), limit) for v, limit in zip(box, limits, strict=True)]
                if not (inside[2] > inside[0] and inside[3] > inside[1]):
                    dropped.append(record["file_name"])
                    continue
                if inside != box:
                    annotation["bbox"] = BoxMode.convert(inside, BoxMode.XYXY_ABS, mode)
                    # half a pixel beyond the border is rounding, not worth a warning
                    if max(abs(a - b) for a, b in zip(inside, box, strict=True)) > 0.5:
                        clipped.append(record["file_name"])
            kept.append(annotation)
        record["annotations"] = kept
    if clipped:
        logger.warning("Clipped %d boxes that exceeded their images (first in %s)", len(clipped), clipped[0])
    if dropped:
        logger.warning(
            "Dropped %d boxes that were empty or outside their images (first in %s)",
            len(dropped),
            dropped[0],
        )
    return dataset


def mark_objects_without_mask(dataset: Any, source: str) -> Any:
    """Mark objects that have a box but no mask, so that only the mask loss leaves them out; log how many.

    Args:
        dataset: dataset dicts, changed in place: these objects get ``has_mask`` False and an empty
            ``segmentation``. Anything else is returned unchanged.
        source: names of the datasets, for the message.

    Raises:
        DataError: If there are objects, and none has a mask.
    """
    if not isinstance(dataset, list):
        return dataset
    num_objects, num_marked, first = 0, 0, ""
    for record in dataset:
        annotations = record.get("annotations") or []
        num_objects += len(annotations)
        for annotation in annotations:
            if not (annotation.get("segmentation") or annotation.get("iscrowd", 0)):
                annotation["segmentation"], annotation["has_mask"] = [], False
                num_marked, first = num_marked + 1, first or record["file_name"]
    if num_marked:
        _require_masks(num_objects - num_marked, source)
        logger.warning(
            "Left %d of %d objects out of the mask loss: they have a box but no mask (first in %s). Their "
            "boxes and classes are trained.",
            num_marked,
            num_objects,
            first,
        )
    return dataset


def _require_masks(count: int, source: str) -> None:
    if not count:
        raise DataError(
            f"{source}: no object has a mask, which MODEL.MASK_ON True needs; set MODEL.MASK_ON False to "
            "train on boxes alone"
        )


def drop_objects_without_mask(dataset: Any, source: str) -> Any:
    """Leave objects that have a box but no mask out of training; log how many.

    For models all of whose losses need masks. An image all of whose objects are left out is dropped, as its
    objects would be trained as background.

    Args:
        dataset: dataset dicts, changed in place; anything else is returned unchanged.
        source: names of the datasets, for the message.

    Raises:
        DataError: If there are objects, and none has a mask.
    """
    if not isinstance(dataset, list):
        return dataset
    kept_images, num_objects, num_dropped, first = [], 0, 0, ""
    for record in dataset:
        annotations = record.get("annotations") or []
        kept = [a for a in annotations if a.get("segmentation") or a.get("iscrowd", 0)]
        num_objects += len(annotations)
        if len(kept) < len(annotations):
            num_dropped, first = num_dropped + len(annotations) - len(kept), first or record["file_name"]
            record["annotations"] = kept
        if kept or not annotations:
            kept_images.append(record)
    if not num_dropped:
        return dataset
    _require_masks(num_objects - num_dropped, source)
    logger.warning(
        "Left %d of %d objects and %d images out of training with masks: the objects have a box but no mask "
        "(first in %s). MODEL.MASK_ON False trains all boxes.",
        num_dropped,
        num_objects,
        len(dataset) - len(kept_images),
        first,
    )
    return kept_images
