"""Readers of the standard annotation formats, on content that `read_coco` has checked.

Detectron2 reads COCO panoptic only with .jpg images, LVIS only through the package `lvis` and only with
polygons, and no captions.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pycocotools.mask as mask_util

from clipdense.data.validation.coco import CocoKind, Row, id_order, read_coco

from detectron2.structures import BoxMode

__all__ = ["load_captions", "load_instances", "load_lvis", "load_panoptic", "load_sem_seg"]

DatasetDicts = list[dict[str, Any]]
ClassIds = Mapping[Any, int]
"""Category id -> contiguous class id."""


def load_instances(
    json_file: str | Path, image_root: str | Path, ids: ClassIds, extra: tuple[str, ...] = ()
) -> DatasetDicts:
    """Load COCO instances.

    Args:
        json_file: annotations.
        image_root: folder of the images.
        ids: category id -> contiguous class id.
        extra: further annotation keys to keep; keypoints are moved by half a pixel, as Detectron2 does.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If the file has a fault, or an object of another category; names file and place.
    """
    content = _read(json_file, "instances", image_root)
    images = sorted(content["images"], key=lambda image: id_order(image["id"]))
    sizes = {image["id"]: (image["height"], image["width"]) for image in images}
    annotations = defaultdict(list)
    for annotation in content["annotations"]:
        image_id, category = annotation["image_id"], annotation["category_id"]
        item = _object(annotation, sizes[image_id], ("iscrowd", *extra))
        item["category_id"] = _class_id(category, ids, json_file)
        annotations[image_id].append(item)
    return [_image(image, image_root) | {"annotations": annotations[image["id"]]} for image in images]


def load_panoptic(
    json_file: str | Path,
    image_root: str | Path,
    panoptic_root: str | Path,
    ids: ClassIds,
    things: frozenset[int] | set[int],
    sem_seg_root: str | Path | None = None,
) -> DatasetDicts:
    """Load COCO panoptic segmentation, with images of any type.

    Args:
        json_file: annotations.
        image_root: folder of the images.
        panoptic_root: folder of the panoptic PNGs.
        ids: category id -> contiguous class id.
        things: contiguous class ids of things.
        sem_seg_root: folder of semantic label maps with the file names of the panoptic PNGs.
    """
    content = _read(json_file, "panoptic", image_root)
    images = {image["id"]: image for image in content["images"]}
    dicts = []
    for annotation in content["annotations"]:
        segments = []
        for segment in annotation["segments_info"]:
            label = _class_id(segment["category_id"], ids, json_file)
            segments.append(segment | {"category_id": label, "isthing": label in things})
        record = _image(images[annotation["image_id"]], image_root) | {
            "pan_seg_file_name": str(Path(panoptic_root) / annotation["file_name"]),
            "segments_info": segments,
        }
        if sem_seg_root is not None:
            record["sem_seg_file_name"] = str(Path(sem_seg_root) / annotation["file_name"])
        dicts.append(record)
    return dicts


def load_sem_seg(
    label_root: str | Path,
    image_root: str | Path,
    image_ext: str = ".jpg",
    names: list[str] | None = None,
    label_ext: str = ".png",
) -> DatasetDicts:
    """Load semantic segmentation: label maps and images with equal stems.

    Args:
        label_root: folder of label maps.
        image_root: folder of images; images without a label map are ignored.
        image_ext: suffix of the images.
        names: stems to load (default: every label map).
        label_ext: suffix of the label maps.

    Raises:
        FileNotFoundError: If the folder has no label maps, or an image is missing.
    """
    label_root, image_root = Path(label_root), Path(image_root)
    if names is None:
        names = sorted(path.stem for path in label_root.glob(f"*{label_ext}"))
        if not names:
            raise FileNotFoundError(f"no label maps (*{label_ext}) in {label_root}")
    dicts = [
        {
            "file_name": str(image_root / f"{n}{image_ext}"),
            "image_id": n,
            "sem_seg_file_name": str(label_root / f"{n}{label_ext}"),
        }
        for n in names
    ]
    if missing := [r["file_name"] for r in dicts if not Path(r["file_name"]).is_file()]:
        raise FileNotFoundError(
            f"{len(missing)} images of the label maps in {label_root} are missing, first {missing[0]}"
        )
    return dicts


def load_captions(json_file: str | Path, image_root: str | Path) -> DatasetDicts:
    """Load COCO captions: records with ``captions``, a list of strings, of every image that has one."""
    content = _read(json_file, "captions", image_root)
    captions = defaultdict(list)
    rows = content["annotations"]
    if all("id" in row for row in rows):
        rows = sorted(rows, key=lambda row: id_order(row["id"]))
    for annotation in rows:
        captions[annotation["image_id"]].append(annotation["caption"])
    return [
        _image(image, image_root) | {"captions": captions[image["id"]]}
        for image in sorted(content["images"], key=lambda image: id_order(image["id"]))
        if image["id"] in captions
    ]


def load_lvis(json_file: str | Path, image_root: str | Path, ids: ClassIds | None = None) -> DatasetDicts:
    """Load LVIS instances (polygons or RLE), with the federated lists ``neg_category_ids`` and
    ``not_exhaustive_category_ids`` of each image.

    Args:
        json_file: annotations.
        image_root: folder of COCO; the last two parts of ``coco_url`` are the split folder and file name.
        ids: category id -> contiguous class id (default: category id - 1).
    """
    content = _read(json_file, "lvis", image_root)
    sizes = {image["id"]: (image["height"], image["width"]) for image in content["images"]}
    if ids is None:
        ids = {category["id"]: category["id"] - 1 for category in content["categories"]}
    annotations = defaultdict(list)
    for annotation in content["annotations"]:
        image_id, category = annotation["image_id"], annotation["category_id"]
        item = _object(annotation, sizes[image_id], ("visible",)) | {"iscrowd": 0}
        item["category_id"] = _class_id(category, ids, json_file)
        annotations[image_id].append(item)
    dicts = []
    for image in sorted(content["images"], key=lambda image: id_order(image["id"])):
        name = "/".join(image["coco_url"].split("/")[-2:]) if "coco_url" in image else image["file_name"]
        record = _image(image | {"file_name": name}, image_root)
        for key in ("neg_category_ids", "not_exhaustive_category_ids"):
            record[key] = image.get(key, [])
        dicts.append(record | {"annotations": annotations[image["id"]]})
    return dicts


def _read(json_file: str | Path, kind: CocoKind, image_root: str | Path) -> dict[str, list[Row]]:
    """Read a checked annotation file; raise its errors."""
    content, report = read_coco(json_file, kind, image_root)
    report.raise_errors()
    return content


def _object(annotation: Row, size: tuple[int, int], extra: Iterable[str]) -> dict[str, Any]:
    """Return the entries of an object that Detectron2's mappers read."""
    item = {key: annotation[key] for key in ("bbox", "segmentation", *extra) if key in annotation}
    segmentation = item.get("segmentation")
    if isinstance(segmentation, list):
        item["segmentation"] = [polygon for polygon in segmentation if polygon]
    elif segmentation is not None and isinstance(segmentation["counts"], list):
        item["segmentation"] = mask_util.frPyObjects(segmentation, *size)
    if "keypoints" in item:  # COCO's are indices of pixels, Detectron2's are coordinates
        item["keypoints"] = [v if k % 3 == 2 else v + 0.5 for k, v in enumerate(item["keypoints"])]
    return item | {"bbox_mode": BoxMode.XYWH_ABS}


def _class_id(category: Any, ids: ClassIds, json_file: str | Path) -> int:
    if category not in ids:
        raise ValueError(
            f"{json_file}: an object has category {category!r}, which is not a class of the dataset; use the "
            "annotation file that belongs to it"
        )
    return ids[category]


def _image(image: dict[str, Any], image_root: str | Path) -> dict[str, Any]:
    return {
        "file_name": str(Path(image_root) / image["file_name"]),
        "image_id": image["id"],
        "height": image["height"],
        "width": image["width"],
    }
