"""Random split of a user's data into training and validation, in the same format."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from clipdense.data.datasets.recognise import Found
from clipdense.data.datasets.voc import voc_stems
from clipdense.data.datasets.yolo import read_yolo_yaml
from clipdense.data.json_files import load_json
from clipdense.data.validation.coco import read_coco
from clipdense.data.validation.report import DataError
from clipdense.files import read_text, write_text

from detectron2.data import DatasetCatalog

__all__ = ["split_dataset", "split_keys"]

NAMES = ("train", "val")


def split_keys(keys: Sequence[Any], fraction: float, seed: int) -> tuple[list[Any], list[Any]]:
    """Split a list at random; both parts keep its order, and neither is empty.

    Args:
        keys: at least two.
        fraction: share of the first part, in 0..1, both excluded.
        seed: of the choice.

    Raises:
        DataError: If there are fewer than two keys.
        ValueError: If the fraction is out of its range.
    """
    if not 0 < fraction < 1:
        raise ValueError(
            f"the fraction of training images is {fraction:g}; expected a number between 0 and 1"
        )
    if len(keys) < 2:
        raise DataError(f"{len(keys)} images cannot be split into two parts")
    count = min(max(round(fraction * len(keys)), 1), len(keys) - 1)
    chosen = set(random.Random(seed).sample(range(len(keys)), count))
    return [k for i, k in enumerate(keys) if i in chosen], [k for i, k in enumerate(keys) if i not in chosen]


def split_dataset(found: Found, fraction: float, seed: int, output: Path | None = None) -> list[Found]:
    """Split a dataset into ``train`` and ``val``; images are not copied.

    COCO files are written as ``<name>_train.json`` and ``<name>_val.json``. YOLO gets lists of images and a
    ``data.yaml``, Pascal VOC lists in ``ImageSets``, label maps lists of names.

    Args:
        found: the dataset.
        fraction: share of the training images, in 0..1.
        seed: of the choice.
        output: folder to write; default: that of the data. Pascal VOC's lists lie in its own folder.

    Returns:
        The two parts.

    Raises:
        DataError: If the data cannot be split.
        FileExistsError: If a file with other content would be overwritten.
    """
    writers = {
        "COCO_JSON": _split_coco,
        "COCO_PANOPTIC": _split_coco,
        "": _split_coco,
        "YOLO": _split_yolo,
        "VOC": _split_voc,
        "LABEL_MAPS": _split_label_maps,
    }
    if found.key not in writers:
        raise DataError(f"{found.fields[0]}: {found.kind} cannot be split, as they have no list of images")
    folder = output or Path(found.fields[0]).parent
    return writers[found.key](found, fraction, seed, folder)


def _write(path: Path, text: str) -> str:
    """Write a file that is not there, or is the same already."""
    if path.exists() and read_text(path) != text:
        raise FileExistsError(f"{path} exists; remove it, or name another folder with --output")
    write_text(path, text)
    return str(path)


def _part(found: Found, part: str, fields: tuple[str, ...]) -> Found:
    return Found(found.key, found.kind, f"{found.name}_{part}", fields)


def _split_coco(found: Found, fraction: float, seed: int, folder: Path) -> list[Found]:
    source = Path(found.fields[0])
    kind: Any = {"COCO_JSON": "instances", "COCO_PANOPTIC": "panoptic"}.get(found.key, found.kind)
    read_coco(source, kind)[1].raise_errors()
    content = load_json(source)
    parts = split_keys([image["id"] for image in content["images"]], fraction, seed)
    results = []
    for name, ids in zip(NAMES, map(set, parts), strict=True):
        rows = {
            "images": [row for row in content["images"] if row["id"] in ids],
            "annotations": [row for row in content["annotations"] if row["image_id"] in ids],
        }
        path = _write(folder / f"{source.stem}_{name}.json", json.dumps({**content, **rows}))
        results.append(_part(found, name, (path, *found.fields[1:])))
    return results


def _split_yolo(found: Found, fraction: float, seed: int, folder: Path) -> list[Found]:
    if len(found.fields) == 3:
        raise DataError(
            f"{found.fields[0]}: folders without a data.yaml cannot be split; write one with names and train"
        )
    path, part = Path(found.fields[0]), found.fields[1]
    names, images = read_yolo_yaml(path, part)
    content = yaml.safe_load(read_text(path))
    folder = folder if folder != path.parent else path.parent / "split"
    for name, chosen in zip(NAMES, split_keys(images, fraction, seed), strict=True):
        _write(folder / f"{name}.txt", "".join(f"{image.absolute()}\n" for image in chosen))
    kept = {key: value for key, value in content.items() if key not in ("path", "train", "val", "test")}
    lists = {name: f"{name}.txt" for name in NAMES}
    target = _write(folder / "data.yaml", yaml.safe_dump({**kept, "names": names, **lists}, sort_keys=False))
    return [_part(found, name, (target, name)) for name in NAMES]


def _split_voc(found: Found, fraction: float, seed: int, folder: Path) -> list[Found]:
    root, split, kind = found.fields
    lists = Path(root, "ImageSets", "Main" if kind == "boxes" else "Segmentation")
    for name, stems in zip(
        NAMES, split_keys(voc_stems(Path(root), split, kind), fraction, seed), strict=True
    ):
        _write(lists / f"{name}.txt", "".join(f"{stem}\n" for stem in stems))
    return [_part(found, name, (root, name, kind)) for name in NAMES]


def _split_label_maps(found: Found, fraction: float, seed: int, folder: Path) -> list[Found]:
    with found.registered() as (name, _):
        keys = [record["image_id"] for record in DatasetCatalog.get(name)]
    results = []
    for name, chosen in zip(NAMES, split_keys(keys, fraction, seed), strict=True):
        path = _write(folder / f"{name}.txt", "".join(f"{key}\n" for key in chosen))
        results.append(_part(found, name, (*found.fields, path)))
    return results
