"""Readers of the standard annotation formats, where those of Detectron2 do not suffice.

Detectron2 reads COCO panoptic only with .jpg images, LVIS only through the package `lvis` and only with
polygons, and no captions.
"""

from collections import defaultdict
from pathlib import Path
from typing import Any

from clipdense.data.json_files import load_json

from detectron2.structures import BoxMode

__all__ = ["load_captions", "load_instances", "load_json", "load_lvis", "load_panoptic", "load_sem_seg"]

DatasetDicts = list[dict[str, Any]]


def load_instances(
    json_file: str | Path, image_root: str | Path, ids: dict[int, int], extra: tuple[str, ...] = ()
) -> DatasetDicts:
    """Load COCO instances.

    Args:
        json_file: annotations.
        image_root: folder of the images.
        ids: category id -> contiguous class id.
        extra: further annotation keys to keep.
    """
    content = load_json(json_file)
    annotations = defaultdict(list)
    for annotation in content["annotations"]:
        item = {
            key: annotation[key] for key in ("bbox", "segmentation", "iscrowd", *extra) if key in annotation
        }
        item |= {"bbox_mode": BoxMode.XYWH_ABS, "category_id": ids[annotation["category_id"]]}
        annotations[annotation["image_id"]].append(item)
    return [
        _image(image, image_root) | {"annotations": annotations[image["id"]]}
        for image in sorted(content["images"], key=lambda image: image["id"])
    ]


def load_panoptic(
    json_file: str | Path,
    image_root: str | Path,
    panoptic_root: str | Path,
    ids: dict[int, int],
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
    content = load_json(json_file)
    images = {image["id"]: image for image in content["images"]}
    dicts = []
    for annotation in content["annotations"]:
        segments = [
            segment
            | {"category_id": ids[segment["category_id"]], "isthing": ids[segment["category_id"]] in things}
            for segment in annotation["segments_info"]
        ]
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
    content = load_json(json_file)
    captions = defaultdict(list)
    for annotation in sorted(content["annotations"], key=lambda a: a["id"]):
        captions[annotation["image_id"]].append(annotation["caption"])
    return [
        _image(image, image_root) | {"captions": captions[image["id"]]}
        for image in sorted(content["images"], key=lambda image: image["id"])
        if image["id"] in captions
    ]


def load_lvis(
    json_file: str | Path, image_root: str | Path, ids: dict[int, int] | None = None
) -> DatasetDicts:
    """Load LVIS instances (polygons or RLE), with the federated lists ``neg_category_ids`` and
    ``not_exhaustive_category_ids`` of each image.

    Args:
        json_file: annotations.
        image_root: folder of COCO; the last two parts of ``coco_url`` are the split folder and file name.
        ids: category id -> contiguous class id (default: category id - 1).
    """
    content = load_json(json_file)
    annotations = defaultdict(list)
    for annotation in content["annotations"]:
        item = {key: annotation[key] for key in ("bbox", "segmentation", "visible") if key in annotation}
        category = annotation["category_id"]
        item |= {"bbox_mode": BoxMode.XYWH_ABS, "iscrowd": 0}
        item["category_id"] = category - 1 if ids is None else ids[category]
        annotations[annotation["image_id"]].append(item)
    dicts = []
    for image in sorted(content["images"], key=lambda image: image["id"]):
        name = "/".join(image["coco_url"].split("/")[-2:]) if "coco_url" in image else image["file_name"]
        record = _image(image | {"file_name": name}, image_root)
        for key in ("neg_category_ids", "not_exhaustive_category_ids"):
            record[key] = image.get(key, [])
        dicts.append(record | {"annotations": annotations[image["id"]]})
    return dicts


def _image(image: dict[str, Any], image_root: str | Path) -> dict[str, Any]:
    return {
        "file_name": str(Path(image_root) / image["file_name"]),
        "image_id": image["id"],
        "height": image["height"],
        "width": image["width"],
    }
