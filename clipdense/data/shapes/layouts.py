"""Annotation files of the `shapes` world in the layouts of COCO, COCO panoptic, COCO captions and LVIS v1."""

from collections.abc import Iterable, Sequence
from itertools import product
from typing import Any

from clipdense.data.shapes.captions import SYNONYMS
from clipdense.data.shapes.draw import Rng
from clipdense.data.shapes.records import file_name
from clipdense.data.shapes.splits import FREQUENCY, find_split
from clipdense.data.shapes.world import CLASSES, COLORS, GROUNDS, NOVEL, NOVEL_SHAPES, SHAPES

__all__ = [
    "CATEGORIES",
    "class_synonyms",
    "coco_captions",
    "coco_instances",
    "coco_panoptic",
    "lvis_instances",
    "novel_kind",
]

Record = dict[str, Any]

_LVIS_SKIP, _LVIS_PARTIAL, _LVIS_NEGATIVES = 0.1, 0.25, 8


def novel_kind(category: int) -> str | None:
    """Return the kind of a novel class.

    Args:
        category: thing class id, 0..79.

    Returns:
        "novel_shape", "novel_combination", or None for a base class.
    """
    if category not in NOVEL:
        return None
    return "novel_shape" if SHAPES[category % len(SHAPES)] in NOVEL_SHAPES else "novel_combination"


def class_synonyms(category: int) -> list[str]:
    """List all names that captions may use for a thing class (id 0..79), its class name first."""
    words = product(SYNONYMS[COLORS[category // len(SHAPES)]], SYNONYMS[SHAPES[category % len(SHAPES)]])
    return [" ".join(pair) for pair in words]


CATEGORIES: list[dict[str, Any]] = [
    {"id": k + 1, "name": name, "supercategory": SHAPES[k % len(SHAPES)], "isthing": 1}
    for k, name in enumerate(CLASSES)
] + [
    {"id": len(CLASSES) + g + 1, "name": name, "supercategory": "ground", "isthing": 0}
    for g, name in enumerate(GROUNDS)
]
"""COCO categories: the 80 things (ids 1..80) and 8 grounds (ids 81..88)."""


def coco_instances(records: Iterable[Record], categories: Sequence[int] | None = None) -> dict[str, Any]:
    """Convert records to COCO instances.

    Args:
        records: see `records.scene_record`.
        categories: thing class ids, 0..79. Images without any of them are left out. By default all classes
            and all images are kept.

    Returns:
        The content of a COCO instances file. Each annotation has one more field, ``visible``, the visible
        share of the whole object (0..1).
    """
    kept = set(range(len(CLASSES)) if categories is None else categories)
    images, annotations = [], []
    for record in records:
        own = [
            _annotation(record, number, thing)
            for number, thing in _things(record)
            if thing["category"] in kept
        ]
        if own or categories is None:
            images.append(_image(record))
            annotations += own
    return _file(images, annotations, [c for c in CATEGORIES[: len(CLASSES)] if c["id"] - 1 in kept])


def coco_panoptic(records: Iterable[Record], categories: Sequence[int] | None = None) -> dict[str, Any]:
    """Convert records to COCO panoptic segments of things and of all grounds.

    Args:
        records: see `records.scene_record`.
        categories: thing class ids, 0..79. Images without any of them are left out. A segment of another
            class keeps its pixels in the PNG but has no entry, so it is void. By default all classes and all
            images are kept.

    Returns:
        The content of a COCO panoptic file.
    """
    kept = set(range(len(CLASSES)) if categories is None else categories)
    images, annotations = [], []
    for record in records:
        segments = [
            _segment(number, thing["category"], thing)
            for number, thing in _things(record)
            if thing["category"] in kept
        ]
        if not segments and categories is not None:
            continue
        segments += [_segment(100 + s["ground"], len(CLASSES) + s["ground"], s) for s in record["stuff"]]
        images.append(_image(record))
        annotations.append(
            {"image_id": record["id"], "file_name": file_name(record["id"]), "segments_info": segments}
        )
    return _file(images, annotations, [c for c in CATEGORIES if not c["isthing"] or c["id"] - 1 in kept])


def coco_captions(records: Iterable[Record]) -> dict[str, Any]:
    """Convert records (see `records.scene_record`) to COCO captions, five per image."""
    images, annotations = [], []
    for record in records:
        images.append(_image(record))
        for number, caption in enumerate(record["captions"], start=1):
            annotations.append(
                {"id": 10 * record["id"] + number, "image_id": record["id"], "caption": caption}
            )
    return {"info": _INFO, "licenses": [], "images": images, "annotations": annotations}


def lvis_instances(records: Iterable[Record], split: str) -> dict[str, Any]:
    """Convert records to LVIS v1 federated annotations.

    As in LVIS, an image is labelled for some classes only:

    - Each frequent or common class of a scene is left out with probability 0.1. It is then neither positive
      nor negative in that image.
    - If a class has several instances, one of them is left unlabelled with probability 0.25. The class is
      then listed in ``not_exhaustive_category_ids``.
    - Eight classes that the scene does not contain are listed in ``neg_category_ids``.

    Args:
        records: see `records.scene_record`.
        split: name of the split, see `splits.SPLITS`.

    Returns:
        The content of an LVIS file with RLE masks. ``frequency`` is the group in `splits.FREQUENCY`.
        ``image_count`` and ``instance_count`` are the numbers in this file.
    """
    images, annotations = [], []
    image_count, instance_count = [0] * len(CLASSES), [0] * len(CLASSES)
    for record in records:
        rng = Rng(2000 + find_split(split).seed, record["id"])
        by_class: dict[int, list[tuple[int, dict[str, Any]]]] = {}
        for number, thing in _things(record):
            by_class.setdefault(thing["category"], []).append((number, thing))
        partial = []
        for category, things in sorted(by_class.items()):
            skip, leave_one = rng.uniform(0, 1) < _LVIS_SKIP, rng.uniform(0, 1) < _LVIS_PARTIAL
            if skip and FREQUENCY[category] != "r":
                continue
            if leave_one and len(things) > 1:
                things = things[1:]
                partial.append(category + 1)
            annotations += [_annotation(record, number, thing) for number, thing in things]
            image_count[category] += 1
            instance_count[category] += len(things)
        absent = [k for k in range(len(CLASSES)) if k not in by_class]
        negative = [absent[i] + 1 for i in rng.permutation(len(absent))[:_LVIS_NEGATIVES]]
        image = _image(record) | {
            # LVIS readers take the folder and the file name from this URL.
            "coco_url": f"shapes/{split}/{file_name(record['id'])}",
            "neg_category_ids": sorted(negative),
            "not_exhaustive_category_ids": partial,
        }
        images.append(image)
    categories = [
        {
            "id": k + 1,
            "name": name,
            "synset": name.replace(" ", "_") + ".n.01",
            "synonyms": class_synonyms(k),
            "def": f"a {name.split()[1]} coloured {name.split()[0]}",
            "frequency": FREQUENCY[k],
            "image_count": image_count[k],
            "instance_count": instance_count[k],
        }
        for k, name in enumerate(CLASSES)
    ]
    return _file(images, annotations, categories)


_INFO = {"description": "shapes: a procedural world with exact ground truth", "version": "1"}


def _file(images: list[Any], annotations: list[Any], categories: list[Any]) -> dict[str, Any]:
    return {
        "info": _INFO,
        "licenses": [],
        "images": images,
        "annotations": annotations,
        "categories": categories,
    }


def _things(record: Record) -> Iterable[tuple[int, dict[str, Any]]]:
    return enumerate(record["things"], start=1)


def _image(record: Record) -> dict[str, Any]:
    return {
        "id": record["id"],
        "file_name": file_name(record["id"]),
        "width": record["width"],
        "height": record["height"],
    }


def _annotation(record: Record, number: int, thing: dict[str, Any]) -> dict[str, Any]:
    return {
        "id": 100 * record["id"] + number,
        "image_id": record["id"],
        "category_id": thing["category"] + 1,
        "bbox": thing["bbox"],
        "area": thing["area"],
        "segmentation": {"size": [record["height"], record["width"]], "counts": thing["rle"]},
        "iscrowd": 0,
        "visible": thing["visible"],
    }


def _segment(segment_id: int, category: int, region: dict[str, Any]) -> dict[str, Any]:
    return {
        "id": segment_id,
        "category_id": category + 1,
        "area": region["area"],
        "bbox": region["bbox"],
        "iscrowd": 0,
    }
