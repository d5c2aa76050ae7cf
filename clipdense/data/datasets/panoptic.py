"""A user's own COCO panoptic annotations, for panoptic, semantic and instance segmentation."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import pycocotools.mask as mask_util

from clipdense.data.datasets.coco import register_instances
from clipdense.data.datasets.converted import converted_json, converted_labels, void_label
from clipdense.data.datasets.layouts import DatasetDicts, load_panoptic
from clipdense.data.datasets.registration import is_registered, register_once
from clipdense.data.image import read_labels
from clipdense.data.validation.coco import Row, id_order, read_coco
from clipdense.data.validation.report import DataError, Report

__all__ = ["PanopticKind", "register_panoptic"]

PanopticKind = Literal["panoptic", "semantic", "instances"]


def register_panoptic(
    name: str, json_file: str, panoptic_root: str, image_root: str, kind: str = "panoptic"
) -> None:
    """Register COCO panoptic annotations.

    ``panoptic`` has the segments and their semantic label maps; ``semantic`` the label maps alone, with every
    class; ``instances`` the things alone, with their masks, for detectors. Label maps and instances are
    converted into the cache folder.

    Args:
        name: of the dataset.
        json_file: annotations; each category has ``isthing``.
        panoptic_root: folder of the panoptic PNGs.
        image_root: folder of the images.
        kind: ``panoptic``, ``semantic`` or ``instances``.

    Raises:
        FileNotFoundError: If the file or a folder does not exist.
        DataError: If the annotations have a fault; names it.
        ValueError: If the kind is unknown, or the name is in use.
    """
    if kind not in get_args(PanopticKind):
        raise ValueError(f"dataset {name}: {kind!r} is not a kind; expected panoptic, semantic or instances")
    identity = {"panoptic_json": json_file, "panoptic_root": panoptic_root, "panoptic_kind": kind}
    if is_registered(name, identity):
        return
    if not os.path.isfile(json_file):
        raise FileNotFoundError(f"dataset {name}: no annotation file {json_file}")
    for what, path in (("folder of panoptic PNGs", panoptic_root), ("image folder", image_root)):
        if not os.path.isdir(path):
            raise FileNotFoundError(f"dataset {name}: no {what} {path}")
    content, report = read_coco(json_file, "panoptic", image_root)
    report.raise_errors()
    source = _Source(name, json_file, panoptic_root, image_root, content)
    if kind == "instances":
        register_instances(name, source.instances(), image_root, identity | {"source": json_file})
        return
    metadata: dict[str, Any] = {
        "image_root": image_root,
        "label_root": panoptic_root,
        "ignore_label": void_label(len(source.names)),
        "stuff_classes": source.names,
    }
    if kind == "semantic":
        register_once(name, source.load_semantic, identity, metadata | {"evaluator_type": "sem_seg"})
        return
    things = {i: k for i, k in source.ids.items() if k in source.things}
    metadata |= {
        "evaluator_type": "coco_panoptic_seg",
        "label_divisor": 1000,
        "thing_classes": source.names,
        "thing_dataset_id_to_contiguous_id": things,
        "stuff_dataset_id_to_contiguous_id": {i: k for i, k in source.ids.items() if i not in things},
    }
    register_once(name, source.load_panoptic, identity, metadata)


class _Source:
    """Checked annotations and the folders beside them.

    Attributes:
        names: of the classes, in the order of the ids of their categories.
        ids: id of a category -> class.
        things: classes that are things.
    """

    def __init__(
        self, name: str, json_file: str, panoptic_root: str, image_root: str, content: dict[str, list[Row]]
    ) -> None:
        self.name, self.json_file, self.image_root = name, Path(json_file), Path(image_root)
        self.panoptic_root = Path(panoptic_root)
        categories = sorted(content["categories"], key=lambda category: id_order(category["id"]))
        self.names = [category["name"] for category in categories]
        self.ids = {category["id"]: k for k, category in enumerate(categories)}
        self.things = {self.ids[category["id"]] for category in categories if category["isthing"]}
        self._categories = categories

    def load_panoptic(self) -> DatasetDicts:
        """Load the records, with semantic label maps."""
        records = load_panoptic(self.json_file, self.image_root, self.panoptic_root, self.ids, self.things)
        segments = {
            Path(record["pan_seg_file_name"]): {s["id"]: s["category_id"] for s in record["segments_info"]}
            for record in records
        }
        keys = {path: path.relative_to(self.panoptic_root).with_suffix("").as_posix() for path in segments}
        maps = converted_labels(
            "panoptic_semantic",
            [str(self.json_file.resolve()), repr(self.json_file.stat().st_mtime_ns)],
            {key: path for path, key in keys.items()},
            partial(_semantic, segments=segments, void=void_label(len(self.names))),
            len(self.names) > 255,
        )
        for record in records:
            record["sem_seg_file_name"] = str(maps[keys[Path(record["pan_seg_file_name"])]])
        return records

    def load_semantic(self) -> DatasetDicts:
        """Load the records of semantic segmentation."""
        keys = ("file_name", "image_id", "height", "width", "sem_seg_file_name")
        return [{key: record[key] for key in keys} for record in self.load_panoptic()]

    def instances(self) -> Path:
        """Return a COCO file of the things with their masks, converted if necessary."""
        options = [str(self.panoptic_root.resolve())]
        return converted_json("panoptic_things", options, [self.json_file, self.panoptic_root], self._things)

    def _things(self) -> tuple[dict[str, Any], Report]:
        content, report = read_coco(self.json_file, "panoptic", self.image_root)
        things = [category for category in self._categories if category["isthing"]]
        known = {category["id"] for category in things}
        annotations: list[Row] = []
        for row in content["annotations"]:
            ids = read_labels(self.panoptic_root / row["file_name"])
            for segment in row["segments_info"]:
                mask = ids == segment["id"]
                if segment["category_id"] not in known or not mask.any():
                    continue
                rle = mask_util.encode(np.asfortranarray(mask, np.uint8))
                annotations.append(
                    {"id": len(annotations) + 1, "image_id": row["image_id"], "area": int(mask.sum())}
                    | {"category_id": segment["category_id"], "iscrowd": int(segment.get("iscrowd", 0))}
                    | {"bbox": mask_util.toBbox(rle).tolist()}
                    | {"segmentation": {"size": list(mask.shape), "counts": rle["counts"].decode("ascii")}}
                )
        listed = {row["image_id"] for row in content["annotations"]}
        images = [image for image in content["images"] if image["id"] in listed]
        return {"images": images, "annotations": annotations, "categories": things}, report


def _semantic(path: Path, segments: dict[Path, dict[int, int]], void: int) -> npt.NDArray[np.int64]:
    """Replace the segment ids of a panoptic PNG by the classes of the segments."""
    ids = read_labels(path)
    values, where = np.unique(ids, return_inverse=True)
    classes = segments[path]
    if unknown := [v for v in values.tolist() if v and v not in classes]:
        raise DataError(
            f"{path}: segment {unknown[0]} is not in segments_info; list it, or set its pixels to 0"
        )
    table = np.array([classes.get(int(v), void) for v in values], np.int64)
    return table[where].reshape(ids.shape)
