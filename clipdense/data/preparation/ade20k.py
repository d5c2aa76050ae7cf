"""Conversion of ADE20K: panoptic and instance annotations, and the full set of objects."""

import json
import pickle
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pycocotools.mask as mask_util
from PIL import Image
from tqdm import tqdm

from clipdense.data.image import read_image, read_labels
from clipdense.data.preparation.files import map_in_threads, save_image
from clipdense.files import write_text

__all__ = ["ade20k_full", "ade20k_panoptic", "read_object_names"]


def ade20k_panoptic(root: Path, folder: str, split: str, things: Sequence[int], names: Sequence[str]) -> None:
    """Write panoptic PNGs and JSON, and COCO instances, of ADE20K's published semantic and instance maps.

    ``annotations/<folder>``: grey value = class + 1, 0 is unlabelled. ``annotations_instance/<folder>``: red
    = number of the thing class (1 to 100), green = instance. Each instance is a segment. On the remaining
    pixels each stuff class is one; pixels of thing classes without an instance are void.

    Args:
        root: folder ADEChallengeData2016.
        folder: "training" or "validation".
        split: "train" or "val", for the names of the files written below ``root``.
        things: indices of the thing classes in ``names``, in the order of their numbers in the instance maps.
        names: all class names.

    Raises:
        FileNotFoundError: If a folder has no label maps.
    """
    panoptic_root = root / f"ade20k_panoptic_{split}"
    panoptic_root.mkdir(parents=True, exist_ok=True)
    paths = sorted((root / "annotations" / folder).glob("*.png"))
    if not paths:
        raise FileNotFoundError(f"no label maps (*.png) in {root / 'annotations' / folder}")
    images: list[dict[str, Any]] = []
    panoptic: list[dict[str, Any]] = []
    instances: list[dict[str, Any]] = []
    for image_id, path in enumerate(tqdm(paths, desc=str(panoptic_root), unit="file"), start=1):
        semantic = read_labels(path) - 1
        objects = read_labels(root / "annotations_instance" / folder / path.name)
        ids = np.zeros_like(semantic)
        segments: list[dict[str, Any]] = []
        for value in np.unique(objects & 0xFFFF):
            number, mask = int(value & 0xFF), (objects & 0xFFFF) == value
            if number:
                segments.append(_segment(ids, mask, len(segments) + 1, things[number - 1]))
                rle = mask_util.encode(np.asfortranarray(mask, np.uint8))
                rle["counts"] = rle["counts"].decode("ascii")
                instances.append(
                    segments[-1] | {"id": len(instances) + 1, "image_id": image_id, "segmentation": rle}
                )
        for value in np.unique(semantic[ids == 0]):
            if value >= 0 and value not in things:
                mask = (semantic == value) & (ids == 0)
                segments.append(_segment(ids, mask, len(segments) + 1, int(value)))
        rgb = np.stack([ids & 0xFF, ids >> 8 & 0xFF, ids >> 16], axis=-1).astype(np.uint8)
        save_image(Image.fromarray(rgb), panoptic_root / path.name)
        height, width = ids.shape
        images.append({"id": image_id, "file_name": f"{path.stem}.jpg", "height": height, "width": width})
        panoptic.append({"image_id": image_id, "file_name": path.name, "segments_info": segments})
    categories = [{"id": i, "name": name, "isthing": int(i in things)} for i, name in enumerate(names)]
    for kind, annotations, kept in (
        ("panoptic", panoptic, categories),
        ("instance", instances, [c for c in categories if c["isthing"]]),
    ):
        content = {"images": images, "annotations": annotations, "categories": kept}
        write_text(root / f"ade20k_{kind}_{split}.json", json.dumps(content))


def ade20k_full(root: Path, split: str, ids: Mapping[int, int], void: int, side: int = 512) -> int:
    """Write images and 16-bit label maps of full ADE20K, as MaskFormer (Cheng et al., NeurIPS 2021) does.

    Below ``images/ADE/<split>/`` every .jpg has a ``_seg.png`` beside it, whose red and green values encode
    the object: R // 10 * 256 + G. The results are written to ``images_detectron2/<split>/`` and
    ``annotations_detectron2/<split>/``. Images that are small enough are copied unchanged.

    Args:
        root: folder ADE20K_2021_17_01.
        split: "training" or "validation".
        ids: object -> class; all other objects are void.
        void: label of void pixels.
        side: largest short side in pixels. Larger images are resized bilinearly, their labels by nearest
            neighbour.

    Returns:
        The number of images that this call has written.

    Raises:
        FileNotFoundError: If there are no images, or one has no label map.
    """
    source = root / "images" / "ADE" / split
    paths = sorted(source.rglob("*.jpg"))
    if not paths:
        raise FileNotFoundError(f"no images (*.jpg) in {source}; it is a part of ADE20K_2021_17_01.zip")
    images, labels = (root / f"{kind}_detectron2" / split for kind in ("images", "annotations"))
    for folder in (images, labels):
        folder.mkdir(parents=True, exist_ok=True)

    def run(path: Path) -> None:
        # the label map is written last: its existence means that both files exist
        colors = read_image(path.with_name(f"{path.stem}_seg.png")).astype(np.int64)
        objects = colors[..., 0] // 10 * 256 + colors[..., 1]
        values, where = np.unique(objects, return_inverse=True)
        classes = np.array([ids.get(int(v), void) for v in values], np.uint16)[where.reshape(objects.shape)]
        height, width = objects.shape
        short = min(height, width)
        if short > side:
            size = round(width / short * side), round(height / short * side)
            image = cv2.resize(read_image(path), size, interpolation=cv2.INTER_LINEAR)
            classes = cv2.resize(classes, size, interpolation=cv2.INTER_NEAREST)
            save_image(Image.fromarray(image), images / path.name)
        else:
            shutil.copyfile(path, images / path.name)
        save_image(Image.fromarray(classes), labels / f"{path.stem}.tif")

    return map_in_threads(run, [p for p in paths if not (labels / f"{p.stem}.tif").is_file()], str(labels))


def read_object_names(path: Path) -> list[str]:
    """Read the names of ADE20K's objects from its index (index_ade20k.pkl), starting with number 1.

    No code of the pickle is executed: objects other than text, numbers, lists and dicts become empty ones.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If it has no list ``objectnames``.
    """
    with path.open("rb") as file:
        try:
            names = _PlainUnpickler(file).load()["objectnames"]
        except Exception as error:  # damaged pickles raise almost anything
            raise ValueError(f"{path}: not an index of ADE20K ({error!r})") from error
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{path}: objectnames is not a list of names")
    return names


class _PlainUnpickler(pickle.Unpickler):
    """Unpickler of plain Python data; it replaces any other object by an empty one."""

    def find_class(self, module: str, name: str) -> Any:
        """Return the class of the empty object, whatever class is requested."""
        return _Empty


class _Empty:
    def __init__(self, *args: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...


def _segment(
    ids: npt.NDArray[np.int64], mask: npt.NDArray[np.bool_], segment_id: int, category: int
) -> dict[str, Any]:
    """Write a segment into the id map and return its entry of segments_info."""
    ids[mask] = segment_id
    ys, xs = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    box = [int(xs[0]), int(ys[0]), int(xs[-1] - xs[0]) + 1, int(ys[-1] - ys[0]) + 1]
    return {"id": segment_id, "category_id": category, "area": int(mask.sum()), "bbox": box, "iscrowd": 0}
