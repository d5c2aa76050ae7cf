"""Reading annotation files in COCO's layouts: checked, and repaired where only one meaning is possible.

Every reader and evaluator takes such a file through `read_coco`, so that training, evaluation and
``tools/check_data.py`` agree on what it holds.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from clipdense.data.image import header_size
from clipdense.data.json_files import load_json
from clipdense.data.validation.report import Report
from clipdense.data.validation.segmentation import box_fault, box_place, has_mask, mask_fault

__all__ = ["CocoKind", "Row", "id_order", "read_categories", "read_coco"]

CocoKind = Literal["instances", "lvis", "captions", "panoptic"]
Row = dict[str, Any]

_CLASS_FREE = ("captions",)


def id_order(identity: int | str) -> tuple[bool, int | str]:
    """Return a sorting key of ids: numbers in order, then text in order."""
    return isinstance(identity, str), identity


def read_coco(
    json_file: str | Path,
    kind: CocoKind = "instances",
    image_root: str | Path | None = None,
    *,
    image_names_required: bool = True,
    image_list_required: bool = True,
) -> tuple[dict[str, list[Row]], Report]:
    """Read an annotation file in COCO's layout, check all of it and repair what is unambiguous.

    Args:
        json_file: path of the file.
        kind: "instances" (COCO), "lvis", "captions" or "panoptic".
        image_root: folder from whose images a missing height and width are read; None: they must be there.
        image_names_required: whether an image without a file name is an error; evaluators do not need it.
        image_list_required: whether "images" must be there; panoptic annotations can be used without.

    Returns:
        ``images``, ``annotations`` and ``categories`` (empty for captions), without null fields, and what was
        found. ``annotations`` lack those of unknown images. If the report has errors, the rows with errors
        are left out: call ``report.raise_errors()`` before using them. Ids stay as in the file: whole
        numbers of any size, or text.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not JSON.
    """
    report = Report(str(json_file))
    content = load_json(json_file)
    if not isinstance(content, dict):
        found = "a list" if isinstance(content, list) else type(content).__name__
        report.add(
            "error", "not an annotation file", f"its top level is {found}", "Expected an object with images."
        )
        return {"images": [], "annotations": [], "categories": []}, report
    categories = [] if kind in _CLASS_FREE else _categories(content, report)
    unlisted = not image_list_required and kind == "panoptic" and "images" not in content
    if unlisted:
        rows = content.get("annotations")
        ids = [row.get("image_id") for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
        content["images"] = [{"id": i, "height": 1, "width": 1} for i in dict.fromkeys(filter(_is_id, ids))]
    images = _images(content, kind, image_root, report, image_names_required and not unlisted)
    required = kind in ("captions", "panoptic")
    annotations = _annotations(content, kind, images, {c["id"] for c in categories}, required, report)
    if kind in ("instances", "lvis"):
        _count_missing_masks(annotations, report)
    if kind == "panoptic":
        _check_things(categories, report)
    report.counts = {"images": len(images), "annotations": len(annotations), "classes": len(categories)}
    if kind in _CLASS_FREE:
        del report.counts["classes"]
    return {"images": images, "annotations": annotations, "categories": categories}, report


def read_categories(json_file: str | Path) -> list[Row]:
    """Read the categories of an annotation file in the order of their ids.

    Raises:
        FileNotFoundError: If there is no such file.
        DataError: If the file has no list of categories, or one with a fault; names it.
        ValueError: If it is not JSON.
    """
    report = Report(str(json_file))
    content = load_json(json_file)
    if not isinstance(content, dict):
        content = {}
    categories = _categories(content, report)
    report.raise_errors()
    return sorted(categories, key=lambda category: id_order(category["id"]))


def _rows(content: Mapping[str, Any], key: str, report: Report, *, required: bool = True) -> list[Row]:
    """The list ``content[key]``, without null fields."""
    if key not in content and not required:
        return []
    rows = content.get(key)
    if not isinstance(rows, list):
        found = "missing" if key not in content else f"{type(rows).__name__}, not a list"
        report.add("error", f"no list of {key}", f'"{key}" is {found}', "Expected COCO's layout.")
        return []
    kept = []
    for index, row in enumerate(rows):
        if isinstance(row, dict):
            kept.append({k: v for k, v in row.items() if v is not None} if None in row.values() else row)
        else:
            report.add("error", f"{key} that are not objects", f"{key}[{index}]", "Expected COCO's layout.")
    return kept


def _with_ids(rows: list[Row], what: str, names: str, report: Report) -> list[Row]:
    """Rows whose id is a whole number or text, and not an earlier row's."""
    kept: dict[int | str, Row] = {}
    for index, row in enumerate(rows):
        identity = row.get("id")
        if isinstance(identity, float) and identity.is_integer():
            identity = int(identity)
            row = row | {"id": identity}
        if isinstance(identity, bool) or not isinstance(identity, int | str):
            report.add(
                "error", f"{what} without a usable id", f"{what} {index} has id {identity!r}", "Give it one."
            )
        elif identity in kept:
            first = kept[identity].get(names, "")
            report.add(
                "error",
                f"two {what} with one id",
                f"id {identity!r} of {first!r} and {row.get(names, '')!r}",
                "Give each an id of its own (files that were joined need new ids).",
            )
        else:
            if isinstance(identity, str):
                report.add(
                    "note", f"ids of {what} that are text", repr(identity), "They are numbered internally."
                )
            kept[identity] = row
    return list(kept.values())


def _categories(content: Mapping[str, Any], report: Report) -> list[Row]:
    rows = _with_ids(_rows(content, "categories", report), "categories", "name", report)
    if "categories" in content and not rows and not report.errors:
        report.add("error", "no classes", '"categories" is empty', "List at least one class.")
    kept, seen = [], dict[str, Any]()
    for row in rows:
        name = row.get("name")
        if not isinstance(name, str) or not name.strip():
            report.add(
                "error", "categories without a name", f"category {row['id']!r}", 'Give it a "name" (text).'
            )
            continue
        if name in seen:
            report.add(
                "note",
                "two categories of one name",
                f"{name!r} is category {seen[name]!r} and {row['id']!r}",
                "They stay two classes; results name them with their ids.",
            )
        seen.setdefault(name, row["id"])
        kept.append(row)
    return kept


def _check_things(categories: Iterable[Row], report: Report) -> None:
    for row in categories:
        if row.get("isthing") not in (0, 1):
            report.add(
                "error",
                "panoptic categories without isthing",
                f"category {row['id']!r} ({row['name']}): {row.get('isthing')!r}",
                "Set it to 1 for a thing and 0 for stuff.",
            )


def _images(
    content: Mapping[str, Any],
    kind: CocoKind,
    image_root: str | Path | None,
    report: Report,
    names_required: bool,
) -> list[Row]:
    rows = _with_ids(_rows(content, "images", report), "images", "file_name", report)
    kept = []
    for row in rows:
        name = row.get("file_name")
        if kind == "lvis" and name is None and isinstance(url := row.get("coco_url"), str):
            name = "/".join(url.split("/")[-2:])
        if name is None and not names_required:
            name = f"image {row['id']!r}"
        if not isinstance(name, str) or not name or "\0" in name:
            report.add(
                "error",
                "images without a file name",
                f"image {row['id']!r} ({name!r})",
                "Give its file_name.",
            )
            continue
        if "height" not in row and "width" not in row:
            size = None if image_root is None else header_size(Path(image_root) / name)
            if size is not None:
                row = row | {"height": size[0], "width": size[1]}
                report.add("repaired", "images without height and width", name, "Read from the image.")
        sides = (row.get("height"), row.get("width"))
        if not all(isinstance(s, int) and not isinstance(s, bool) and 0 < s < 2**20 for s in sides):
            report.add(
                "error",
                "images without a usable size",
                f"{name} has height {sides[0]!r} and width {sides[1]!r}",
                "Give both as whole numbers of pixels.",
            )
            continue
        if kind == "lvis" and not _federated_lists(row, name, report):
            continue
        kept.append(row)
    return kept


def _federated_lists(row: Row, name: str, report: Report) -> bool:
    """Return whether the lists of categories of an LVIS image are lists of ids, if it has them."""
    for key in ("neg_category_ids", "not_exhaustive_category_ids"):
        value = row.get(key, [])
        if not isinstance(value, list) or not all(isinstance(v, int | str) for v in value):
            report.add(
                "error", f"{key} that are not lists of ids", f"{name}: {value!r}"[:80], "Mend or remove it."
            )
            return False
    return True


def _annotations(
    content: Mapping[str, Any],
    kind: CocoKind,
    images: Iterable[Row],
    category_ids: set[Any],
    required: bool,
    report: Report,
) -> list[Row]:
    """Annotations of the images that are there, without faults."""
    rows = _rows(content, "annotations", report, required=required)
    by_id = {image["id"]: image for image in images}
    if kind != "panoptic":
        numbered = [row for row in rows if "id" in row]
        if len(numbered) == len(rows):
            rows = _with_ids(rows, "annotations", "image_id", report)
        elif numbered:
            report.add(
                "note", "annotations without an id", str(rows[0])[:60], "They are numbered internally."
            )
    kept, foreign = [], 0
    for index, row in enumerate(rows):
        row = _whole_references(row)
        label = f"annotation {row.get('id', index)!r}"
        image_id = row.get("image_id")
        image = by_id.get(image_id) if isinstance(image_id, int | str) else None
        if image is None and isinstance(image_id, int | str) and _other_type(image_id) in by_id:
            report.add(
                "error",
                "image ids of another type than the images'",
                f"{label} has image_id {image_id!r}, the image id {_other_type(image_id)!r}",
                "Write both as numbers, or both as text.",
            )
            continue
        if image is None:
            foreign += 1
            unusable = not isinstance(image_id, int | str) or isinstance(image_id, bool)
            report.add(
                "error" if unusable else "note",
                "annotations without an image id"
                if unusable
                else "annotations of images that are not listed",
                f"{label} has image_id {image_id!r}",
                "Give it the id of an image." if unusable else "They are left out.",
            )
            continue
        label += f" of {image.get('file_name', image_id)}"
        if kind == "captions":
            checked = _caption(row, label, report)
        elif kind == "panoptic":
            checked = _segments(row, label, category_ids, report)
        else:
            checked = _instance(row, image, label, category_ids, report)
        if checked is not None:
            kept.append(checked)
    if rows and foreign == len(rows):
        report.add(
            "error",
            "annotations of other images alone",
            f"none of {len(rows)} annotations belongs to one of {len(by_id)} images",
            "Give the annotations of these images.",
        )
    if kind == "panoptic":
        _check_distinct_maps(kept, report)
    return kept


def _whole_references(row: Row) -> Row:
    """Return an annotation whose ids that are whole floats, as pandas writes them, are integers."""
    ids = {
        key: int(row[key])
        for key in ("image_id", "category_id")
        if isinstance(row.get(key), float) and row[key].is_integer()
    }
    return row | ids if ids else row


def _other_type(identity: int | str) -> int | str | None:
    """Return an id as text if it is a number, and as a number if it is the text of one."""
    if isinstance(identity, int):
        return str(identity)
    return int(identity) if identity.isascii() and identity.isdecimal() else None


def _check_distinct_maps(annotations: Iterable[Row], report: Report) -> None:
    for key in ("image_id", "file_name"):
        seen = set()
        for row in annotations:
            if row[key] in seen:
                report.add(
                    "error",
                    f"panoptic annotations that share their {key}",
                    repr(row[key]),
                    "Give each image one annotation with a label map of its own.",
                )
            seen.add(row[key])


def _count_missing_masks(annotations: Sequence[Row], report: Report) -> None:
    """Note objects without a mask, if others have one: a file of boxes alone is nothing to notice."""
    missing = [row for row in annotations if "segmentation" not in row]
    report.without_mask = len(missing)
    if len(missing) < len(annotations):
        for row in missing:
            report.add(
                "note",
                "objects with a box but no mask",
                f"annotation {row.get('id', '')!r} of image {row['image_id']!r}",
                "Their boxes are trained, the mask loss leaves them out, and mask AP counts them as missed.",
            )


def _caption(row: Row, label: str, report: Report) -> Row | None:
    if isinstance(row.get("caption"), str) and row["caption"].strip():
        return row
    report.add(
        "error", "captions that are not text", f"{label}: {row.get('caption')!r}", "Remove or mend it."
    )
    return None


def _segments(row: Row, label: str, category_ids: set[Any], report: Report) -> Row | None:
    """A panoptic annotation whose label map lies in its folder and whose segments have known classes."""
    name, segments = row.get("file_name"), row.get("segments_info")
    path = PurePosixPath(str(name).replace("\\", "/"))
    if not isinstance(name, str) or not name or "\0" in name or path.is_absolute() or ".." in path.parts:
        report.add(
            "error",
            "label maps whose file_name is not one of a file below their folder",
            f"{label}: file_name {name!r}",
            "Name a file below the panoptic root.",
        )
        return None
    if not isinstance(segments, list) or not all(
        isinstance(s, dict) and isinstance(s.get("id"), int) and "category_id" in s for s in segments
    ):
        report.add(
            "error", "segments_info without id and category_id", label, "Expected COCO's panoptic layout."
        )
        return None
    for segment in segments:
        if segment["category_id"] not in category_ids:
            report.add(
                "error",
                "segments of unknown categories",
                f"{label}: category_id {segment['category_id']!r}",
                "List the category.",
            )
            return None
    identities = [segment["id"] for segment in segments]
    if len(set(identities)) < len(identities):
        report.add(
            "error", "segments that share an id", label, "Give each segment of a label map its own id."
        )
        return None
    return row


def _instance(row: Row, image: Row, label: str, category_ids: set[Any], report: Report) -> Row | None:
    """An object: known category, usable box and mask; crowd flag and area repaired."""
    category = row.get("category_id")
    if not isinstance(category, int | str) or category not in category_ids:
        report.add(
            "error",
            "annotations of unknown categories",
            f"{label}: category_id {category!r}",
            'List the category in "categories".',
        )
        return None
    if fault := box_fault(row.get("bbox")):
        report.add("error", "unusable boxes", f"{label}: {fault}", "Mend or remove the annotation.")
        return None
    if fault := box_place(row["bbox"], image["height"], image["width"]):
        report.add(
            "note",
            f"boxes {fault}",
            f"{label}: {row['bbox']}",
            "Training leaves them out; evaluation counts them, as pycocotools does."
            if fault != "that exceed their image"
            else "Training clips them; evaluation takes them as they are, as pycocotools does.",
        )
    crowd = row.get("iscrowd", 0)
    if crowd not in (0, 1):
        report.add("error", "iscrowd that is neither 0 nor 1", f"{label}: {crowd!r}", "Set it to 0 or 1.")
        return None
    row = _without_short_polygons(row, label, report)
    if not has_mask(row.get("segmentation")):
        row = {key: value for key, value in row.items() if key != "segmentation"}
    elif fault := mask_fault(row["segmentation"], image["height"], image["width"]):
        report.add("error", "unusable masks", f"{label}: {fault}", "Mend or remove the annotation.")
        return None
    if row.get("ignore", 0) not in (0, False):
        report.add(
            "error",
            'objects with "ignore"',
            f"{label}: {row['ignore']!r}",
            "COCO's rules know no such field: remove it, or set iscrowd to 1.",
        )
        return None
    if "keypoints" in row and not _is_keypoints(row["keypoints"]):
        report.add("error", "keypoints that are not x, y, v", label, "Give three numbers a keypoint.")
        return None
    area = row.get("area")
    if area is not None and not (isinstance(area, int | float) and math.isfinite(area) and area >= 0):
        report.add("repaired", "areas that are no areas", f"{label}: {area!r}", "Computed from the box.")
        row = {key: value for key, value in row.items() if key != "area"}
    if crowd is not row.get("iscrowd") or isinstance(crowd, bool):
        row = row | {"iscrowd": int(crowd)}
    return row


def _without_short_polygons(row: Row, label: str, report: Report) -> Row:
    """Leave out polygons of fewer than three points if the mask has others."""
    segmentation = row.get("segmentation")
    if not isinstance(segmentation, list) or not all(isinstance(p, list) for p in segmentation):
        return row
    kept = [polygon for polygon in segmentation if len(polygon) >= 6]
    if not kept or len(kept) == len(segmentation):
        return row
    if any(0 < len(polygon) < 6 for polygon in segmentation):
        report.add(
            "repaired", "polygons of fewer than three points", label, "Left out: their masks have others."
        )
    return row | {"segmentation": kept}


def _is_id(value: Any) -> bool:
    return isinstance(value, int | str) and not isinstance(value, bool)


def _is_keypoints(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) % 3 == 0
        and all(isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v) for v in value)
    )
