"""Converting annotations from the layouts in which data sets are published (the work behind
`datasets/prepare_*.py`).

Files that are there already are not made again, and each is written whole or not at all: a stopped run goes
on.
"""

import json
import pickle
import shutil
import zlib
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pycocotools.mask as mask_util
from PIL import Image
from scipy.io import loadmat
from scipy.io.matlab import MatReadError
from tqdm import tqdm

from clipdense.data.datasets.layouts import load_json
from clipdense.data.image import read_image, read_labels
from clipdense.files import atomic_path, write_text

__all__ = [
    "ade20k_full",
    "ade20k_panoptic",
    "convert_labels",
    "panoptic_to_semantic",
    "read_matlab_labels",
    "read_object_names",
    "select_categories",
]

Labels = npt.NDArray[np.int64]


def convert_labels(
    source: Path,
    target: Path,
    convert: Callable[[Labels], Labels],
    names: Sequence[str] | None = None,
    *,
    suffix: str = ".png",
    read: Callable[[Path], Labels] = read_labels,
    wide: bool = False,
) -> int:
    """Convert every label map of a folder, several at a time.

    Args:
        source, target: folders.
        convert: (H, W) labels -> (H, W) labels in 0..255, or 0..65535 if `wide`.
        names: file stems (default: every file).
        suffix: of the source files.
        read: a source file -> (H, W) labels.
        wide: write 16-bit .tif instead of 8-bit .png.

    Returns:
        The number of files converted now.

    Raises:
        FileNotFoundError: a folder without label maps, or a named one that is missing.
        ValueError: a label that `convert`, a table, does not have.
    """
    paths = sorted(source.glob(f"*{suffix}")) if names is None else [source / f"{n}{suffix}" for n in names]
    if not paths:
        raise FileNotFoundError(f"no label maps (*{suffix}) in {source}")
    target.mkdir(parents=True, exist_ok=True)
    ending, dtype = (".tif", np.uint16) if wide else (".png", np.uint8)
    jobs = {path: target / f"{path.stem}{ending}" for path in paths}
    jobs = {path: goal for path, goal in jobs.items() if not goal.is_file()}

    def run(path: Path) -> None:
        try:
            labels = convert(read(path))
        except IndexError as error:
            raise ValueError(f"{path}: a label that is none of the data set's ({error})") from error
        _save(Image.fromarray(labels.astype(dtype)), jobs[path])

    return _in_threads(run, list(jobs), str(target))


def panoptic_to_semantic(panoptic_json: Path, panoptic_root: Path, target: Path) -> int:
    """Semantic label maps from COCO panoptic annotations: classes in order of category id, from 0; 255 where
    there is none.

    Returns:
        The number of files written now.

    Raises:
        FileNotFoundError: the json file or a panoptic PNG is missing.
        ValueError: more classes than a label byte holds.
    """
    content = load_json(panoptic_json)
    ids = {k: i for i, k in enumerate(sorted(c["id"] for c in content["categories"]))}
    if len(ids) > 255:
        raise ValueError(f"{panoptic_json}: {len(ids)} classes do not fit into 8-bit label maps")
    segments = {
        Path(a["file_name"]).stem: {s["id"]: ids[s["category_id"]] for s in a["segments_info"]}
        for a in content["annotations"]
    }
    done = 0
    target.mkdir(parents=True, exist_ok=True)
    for stem, classes in tqdm(segments.items(), desc=str(target), unit="file"):
        path = target / f"{stem}.png"
        if not path.is_file():
            labels = read_labels(panoptic_root / path.name)
            values, where = np.unique(labels, return_inverse=True)
            table = np.array([classes.get(int(v), 255) for v in values], np.uint8)
            _save(Image.fromarray(table[where].reshape(labels.shape)), path)
            done += 1
    return done


def ade20k_panoptic(root: Path, folder: str, split: str, things: Sequence[int], names: Sequence[str]) -> None:
    """ADE20K panoptic PNGs with their json, and instances as COCO json, from the two published annotation
    folders.

    ``annotations/<folder>``: grey value = class + 1, 0 unlabelled. ``annotations_instance/<folder>``: red =
    number of the thing class (1..100), green = instance. Where an instance is, it is the segment; elsewhere
    stuff classes are segments, and pixels of thing classes that belong to no instance are void.

    Args:
        root: ADEChallengeData2016.
        folder: training or validation.
        split: train or val, in the names of what is written below ``root``.
        things: the thing classes, as indices into ``names``, in the order in which the instance folder
            numbers them.
        names: all class names.
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
        _save(Image.fromarray(rgb), panoptic_root / path.name)
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
    """ADE20K with any of its 3,688 objects as classes: images whose short side is at most `side`, and 16-bit
    label maps, as MaskFormer (Cheng et al., NeurIPS 2021) evaluates them.

    ``images/ADE/<split>/``: beside each .jpg, at any depth, a ``_seg.png``, whose red and green are the
    object, R // 10 * 256 + G. Written are ``images_detectron2/<split>/`` and
    ``annotations_detectron2/<split>/``; images that are small enough are copied as they are.

    Args:
        root: ADE20K_2021_17_01.
        split: training or validation.
        ids: object -> class; all others are void.
        void: the label of what is no class.
        side: short side of larger images, which are resized bilinearly, their labels by nearest neighbour.

    Returns:
        The number of images made now.

    Raises:
        FileNotFoundError: no images, or one without label map.
    """
    source = root / "images" / "ADE" / split
    paths = sorted(source.rglob("*.jpg"))
    if not paths:
        raise FileNotFoundError(f"no images (*.jpg) in {source}; it is a part of ADE20K_2021_17_01.zip")
    images, labels = (root / f"{kind}_detectron2" / split for kind in ("images", "annotations"))
    for folder in (images, labels):
        folder.mkdir(parents=True, exist_ok=True)

    def run(path: Path) -> None:
        # the label map is written last: where it is, both are
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
            _save(Image.fromarray(image), images / path.name)
        else:
            shutil.copyfile(path, images / path.name)
        _save(Image.fromarray(classes), labels / f"{path.stem}.tif")

    return _in_threads(run, [p for p in paths if not (labels / f"{p.stem}.tif").is_file()], str(labels))


def read_object_names(path: Path) -> list[str]:
    """The names of ADE20K's objects from its index (index_ade20k.pkl), number 1 first.

    Nothing in the pickle is run: what is neither text, number nor list is left out.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it holds no list ``objectnames``.
    """
    with path.open("rb") as file:
        try:
            names = _ListsOnly(file).load()["objectnames"]
        except (pickle.UnpicklingError, KeyError, TypeError, ValueError, EOFError, AttributeError) as error:
            raise ValueError(f"{path}: no index of ADE20K ({error!r})") from error
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{path}: its objectnames are no list of names")
    return names


class _ListsOnly(pickle.Unpickler):
    """Unpickles plain Python; a blank stands for any other object."""

    def find_class(self, module: str, name: str) -> Any:
        """The blank's class, whatever is asked for."""
        return _Blank


class _Blank:
    def __init__(self, *args: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...


def read_matlab_labels(path: Path) -> Labels:
    """``LabelMap`` (H, W) of a MATLAB file, as PASCAL-Context publishes it.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no MATLAB file, or one without it.
    """
    try:
        return np.asarray(loadmat(path)["LabelMap"], np.int64)
    except (KeyError, ValueError, NotImplementedError, TypeError, MatReadError, zlib.error) as error:
        raise ValueError(f"{path}: no MATLAB file with a LabelMap ({error!r})") from error


def select_categories(
    source: Path,
    target: Path,
    annotated: Collection[int],
    listed: Collection[int] | None = None,
    *,
    all_images: bool = False,
) -> tuple[int, int] | None:
    """A COCO or LVIS json file with the annotations of some categories.

    Args:
        annotated: ids of the categories whose annotations are kept.
        listed: ids of the categories that the file names; None for all.
        all_images: keep the images that no annotation is left of, too.

    Returns:
        Numbers of images and annotations; None where the target is there already.

    Raises:
        FileNotFoundError: the source is missing.
        ValueError: it lacks one of the categories.
    """
    if target.is_file():
        return None
    content = load_json(source)
    if missing := {*annotated, *(listed or ())} - {c["id"] for c in content["categories"]}:
        raise ValueError(f"{source}: no categories {sorted(missing)}; is it the original file?")
    annotations = [a for a in content["annotations"] if a["category_id"] in annotated]
    used = {a["image_id"] for a in annotations}
    images = [i for i in content["images"] if all_images or i["id"] in used]
    categories = [c for c in content["categories"] if listed is None or c["id"] in listed]
    write_text(
        target, json.dumps(content | {"images": images, "annotations": annotations, "categories": categories})
    )
    return len(images), len(annotations)


def _segment(ids: Labels, mask: npt.NDArray[np.bool_], segment_id: int, category: int) -> dict[str, Any]:
    """Write a segment into the id map and describe it."""
    ids[mask] = segment_id
    ys, xs = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    box = [int(xs[0]), int(ys[0]), int(xs[-1] - xs[0]) + 1, int(ys[-1] - ys[0]) + 1]
    return {"id": segment_id, "category_id": category, "area": int(mask.sum()), "bbox": box, "iscrowd": 0}


_FORMATS: dict[str, dict[str, Any]] = {
    ".png": {"format": "PNG"},
    ".jpg": {"format": "JPEG", "quality": 95},
    ".tif": {"format": "TIFF", "compression": "tiff_lzw"},
}


def _in_threads(run: Callable[[Path], None], paths: Sequence[Path], title: str) -> int:
    """Call `run` on every path, with a progress bar; the first error stops all. Returns their number."""
    with ThreadPoolExecutor() as pool:
        try:
            list(tqdm(pool.map(run, paths), desc=title, total=len(paths), unit="file"))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return len(paths)


def _save(image: Image.Image, path: Path) -> None:
    with atomic_path(path) as partial:
        image.save(partial, **_FORMATS[path.suffix])
