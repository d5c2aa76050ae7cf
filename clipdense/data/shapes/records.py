"""Files of one scene of the `shapes` world: its PNGs, and the record for the annotation files."""

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pycocotools.mask as mask_util

from clipdense.data.shapes.captions import captions
from clipdense.data.shapes.draw import Rng
from clipdense.data.shapes.splits import find_split
from clipdense.data.shapes.world import BASE, CLASSES, Scene, render
from clipdense.files import write_error

__all__ = [
    "IGNORE",
    "draw_scene",
    "file_name",
    "panoptic_map",
    "png_folders",
    "scene_record",
    "semantic_map",
    "write_scene",
]

IGNORE = 255
"""Label of ignored pixels (novel things in base-class training)."""

_STUFF_SEGMENT = 100
"""Offset of the segment ids of stuff: 100 + ground. Things have ids 1, 2, ... from bottom to top."""

_BASE_LABELS = np.full(256, IGNORE, np.uint8)
_BASE_LABELS[list(BASE)] = np.arange(len(BASE))
_BASE_LABELS[len(CLASSES) : len(CLASSES) + 8] = len(BASE) + np.arange(8)


def file_name(index: int) -> str:
    """Return the file name of image ``index``, which is also its image id."""
    return f"{index:06d}.png"


def png_folders(root: Path, split: str) -> dict[str, Path]:
    """Return the folders of a split's PNGs.

    Args:
        root: dataset folder.
        split: name of a split.

    Returns:
        Folders of "image", "panoptic", "semantic" and, for training splits, "semantic_ov" (label maps that
        ignore novel classes).

    Raises:
        ValueError: If there is no split of that name.
    """
    folders = {
        "image": root / split,
        "panoptic": root / f"panoptic_{split}",
        "semantic": root / f"semantic_{split}",
    }
    if find_split(split).training:
        folders["semantic_ov"] = root / f"semantic_ov_{split}"
    return folders


def draw_scene(split: str, index: int) -> Scene:
    """Draw scene ``index`` of a split.

    Raises:
        ValueError: If there is no split of that name.
    """
    settings = find_split(split)
    return render(settings.seed, index, shift=settings.shift, class_weights=settings.class_weights)


def semantic_map(scene: Scene) -> npt.NDArray[np.uint8]:
    """Return the contiguous class id of each pixel (H, W): things 0..79, grounds from 80."""
    labels = scene.ground + np.uint8(len(CLASSES))
    for thing in scene.things:
        labels[thing.mask] = thing.category
    return labels


def panoptic_map(scene: Scene) -> npt.NDArray[np.uint8]:
    """Return the segment id of each pixel (H, W): 1, 2, ... for things from bottom to top, 100 + ground."""
    segments = scene.ground + np.uint8(_STUFF_SEGMENT)
    for number, thing in enumerate(scene.things, start=1):
        segments[thing.mask] = number
    return segments


def scene_record(scene: Scene, split: str, index: int) -> dict[str, Any]:
    """Collect the annotations of one image as JSON-ready values.

    Args:
        scene: the drawn scene.
        split: name of its split, which seeds the captions.
        index: number of the scene.

    Returns:
        ``id``, ``width``, ``height``; ``things``: list of ``category`` (0..79), ``bbox`` (x, y, w, h),
        ``area``, ``rle`` (counts), ``visible``, bottom to top; ``stuff``: list of ``ground``, ``bbox``,
        ``area``; ``captions``: five strings.
    """
    height, width = scene.ground.shape
    rles = [mask_util.encode(np.asfortranarray(t.mask, np.uint8)) for t in scene.things]
    things = [
        {
            "category": thing.category,
            "bbox": mask_util.toBbox(rle).tolist(),
            "area": int(mask_util.area(rle)),
            "rle": rle["counts"].decode("ascii"),
            "visible": round(thing.visible, 4),
        }
        for thing, rle in zip(scene.things, rles, strict=True)
    ]
    segments = panoptic_map(scene)
    stuff = []
    for ground in np.unique(scene.ground):
        rle = mask_util.encode(np.asfortranarray(segments == _STUFF_SEGMENT + ground, np.uint8))
        if area := int(mask_util.area(rle)):
            stuff.append({"ground": int(ground), "bbox": mask_util.toBbox(rle).tolist(), "area": area})
    # A separate stream, so that captions do not depend on how many random numbers the drawing used.
    words = Rng(1000 + find_split(split).seed, index)
    return {
        "id": index,
        "width": width,
        "height": height,
        "things": things,
        "stuff": stuff,
        "captions": captions(scene, words, 5),
    }


def write_scene(root: Path, split: str, index: int) -> dict[str, Any]:
    """Draw a scene and write its PNGs.

    Args:
        root: dataset folder; the folders of `png_folders` must exist.
        split: name of a split.
        index: number of the scene.

    Returns:
        The record of the scene, see `scene_record`.

    Raises:
        ValueError: If there is no split of that name.
        OSError: If a file is not writable. The message names the file.
    """
    scene = draw_scene(split, index)
    semantic = semantic_map(scene)
    panoptic = np.zeros((*scene.ground.shape, 3), np.uint8)
    panoptic[..., 0] = panoptic_map(scene)
    pixels = {
        "image": scene.image,
        "panoptic": panoptic,
        "semantic": semantic,
        "semantic_ov": _BASE_LABELS[semantic],
    }
    for kind, folder in png_folders(root, split).items():
        _write_png(folder / file_name(index), pixels[kind])
    return scene_record(scene, split, index)


def _write_png(path: Path, pixels: npt.NDArray[np.uint8]) -> None:
    """Write a PNG, optimised for speed rather than file size."""
    if pixels.ndim == 3:
        pixels = pixels[..., ::-1]  # cv2 expects BGR
    # OpenCV's default (run-length encoding) is a third faster than compression level 1, and files are a fifth
    # larger.
    done, data = cv2.imencode(".png", pixels)
    if not done:
        raise OSError(f"{path}: could not encode the image")
    try:
        path.write_bytes(data.tobytes())
    except OSError as error:
        raise write_error(path, error) from error
