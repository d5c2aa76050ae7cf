"""Mask-category pairs: regions of images with a noun each, as files and as data sets.

What a CLIP is adapted to masked crops with (OVSeg, Liang et al., CVPR 2023, section 3.2). A mask is kept as
run lengths, so that it is never guessed from the colours of a crop.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pycocotools.mask as mask_util
from tqdm import tqdm

from clipdense.data.image import read_labels
from clipdense.files import atomic_path

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils import comm

__all__ = [
    "LabelledSegments",
    "ground_truth_pairs",
    "labelled_segments",
    "pair_mask",
    "read_pairs",
    "register_mask_pairs",
    "segment_classes",
    "write_pairs",
]

Pair = dict[str, Any]

_NEEDED = ("file_name", "height", "width", "segmentation", "noun")


def read_pairs(path: str | Path) -> list[Pair]:
    """Read a pair file.

    Args:
        path: ``.jsonl``, a pair a line, or ``.parquet``, a pair a row.

    Returns:
        Dicts with ``file_name`` (of the image, as it stands in the file), ``height`` and ``width`` in pixels,
        ``segmentation`` (COCO's compressed run lengths: ``size`` and ``counts``, text), ``noun``; where the
        file has them, ``score``, ``image_id`` and ``caption``.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another suffix, a damaged file, or a pair that lacks one of the first five entries; names
            the line.
        ImportError: a parquet file without the package pyarrow.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no pair file {path}")
    pairs: list[Pair] = []
    for number, pair in enumerate(_rows(path), 1):
        missing = [key for key in _NEEDED if pair.get(key) is None]
        if missing:
            raise ValueError(f"{path}, pair {number}: lacks {', '.join(missing)}")
        pairs.append({key: value for key, value in pair.items() if value is not None})
    return pairs


def write_pairs(path: str | Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Write a pair file that `read_pairs` reads; it appears whole or not at all.

    Raises:
        ValueError: another suffix than ``.jsonl`` and ``.parquet``.
        ImportError: a parquet file without the package pyarrow.
    """
    path = Path(path)
    _check_suffix(path)
    with atomic_path(path) as partial_path:
        if path.suffix == ".jsonl":
            with partial_path.open("w", encoding="utf-8") as file:
                for record in records:
                    file.write(json.dumps(record, ensure_ascii=False) + "\n")
        else:
            arrow, parquet = _pyarrow(path)
            rows = list(records)
            columns = list(dict.fromkeys(key for row in rows for key in row))  # the first may lack some
            table = arrow.Table.from_pylist([{key: row.get(key) for key in columns} for row in rows])
            parquet.write_table(table, partial_path)


def _rows(path: Path) -> Iterator[Pair]:
    _check_suffix(path)
    if path.suffix == ".parquet":
        _, parquet = _pyarrow(path)
        try:
            file = parquet.ParquetFile(path)
        except (OSError, ValueError) as error:
            raise ValueError(f"{path}: not a parquet file ({error})") from error
        for batch in file.iter_batches():
            yield from batch.to_pylist()
        return
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                pair = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: not JSON ({error})") from error
            if not isinstance(pair, dict):
                raise ValueError(f"{path}, line {number}: expected a pair as a JSON object")
            yield pair


def _check_suffix(path: Path) -> None:
    if path.suffix not in (".jsonl", ".parquet"):
        raise ValueError(f"{path}: pair files end in .jsonl or .parquet")


def _pyarrow(path: Path) -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError(f"{path} needs the package pyarrow (pip install pyarrow), or use .jsonl") from error
    return pyarrow, pyarrow.parquet


def pair_mask(pair: Mapping[str, Any]) -> npt.NDArray[np.bool_]:
    """The mask (H, W) of a pair from a file or from `ground_truth_pairs`.

    Raises:
        ValueError: run lengths that are damaged; names the image and the noun.
    """
    if "segmentation" not in pair:
        return read_labels(pair["label_file_name"]) == pair["label"]
    try:
        mask: npt.NDArray[np.uint8] = mask_util.decode(pair["segmentation"])
    except (TypeError, ValueError, KeyError) as error:
        raise ValueError(f"{pair['file_name']}: the mask of {pair['noun']!r} is damaged ({error})") from error
    return mask.astype(bool)


@dataclass(frozen=True)
class LabelledSegments:
    """The annotated segments of an image.

    Attributes:
        file_name: label map, for `read_labels`.
        labels: n values in it, one a segment.
        classes: n contiguous class ids.
    """

    file_name: str
    labels: list[int]
    classes: list[int]


def labelled_segments(record: Mapping[str, Any], ignore_label: int = 255) -> LabelledSegments:
    """The segments of a dataset dict: panoptic ones but for crowds; of semantic segmentation one a class.

    Raises:
        ValueError: the data set has neither.
    """
    if "pan_seg_file_name" in record:
        segments = [s for s in record["segments_info"] if not s.get("iscrowd", 0)]
        return LabelledSegments(
            record["pan_seg_file_name"], [s["id"] for s in segments], [s["category_id"] for s in segments]
        )
    if "sem_seg_file_name" not in record:
        raise ValueError(
            f"{record.get('file_name')}: its data set has neither panoptic nor semantic segmentations"
        )
    present = np.unique(read_labels(record["sem_seg_file_name"])).tolist()
    classes = [label for label in present if label != ignore_label]
    return LabelledSegments(record["sem_seg_file_name"], classes, classes)


def segment_classes(name: str) -> list[str]:
    """Class names of a data set's segments, in order of contiguous id.

    Raises:
        ValueError: the data set does not name them all in ``stuff_classes`` (Detectron2's separated panoptic
            sets label things as one class).
    """
    classes = [c.strip() for c in MetadataCatalog.get(name).get("stuff_classes") or ()]
    if not classes or classes[0] == "things":
        raise ValueError(f"data set {name} does not name things and stuff together, in stuff_classes")
    return classes


def ground_truth_pairs(name: str) -> list[Pair]:
    """The annotated segments of a registered data set, each with the name of its class.

    Only what is labelled gives a pair, so a set that labels base classes alone never tells of novel ones.

    Returns:
        As `read_pairs`, but for the mask: where ``label_file_name`` has the value ``label``.

    Raises:
        ValueError: the data set has no panoptic and no semantic segmentations; and see `segment_classes`.
    """
    records, classes, pairs = DatasetCatalog.get(name), segment_classes(name), []
    ignore = MetadataCatalog.get(name).get("ignore_label", 255)
    semantic = not any("pan_seg_file_name" in record for record in records[:1])
    quiet = not semantic or not comm.is_main_process()  # label maps have to be read only there
    for record in tqdm(records, f"Segments of {name}", unit="image", disable=True if quiet else None):
        segments = labelled_segments(record, ignore)
        image = {key: record[key] for key in ("file_name", "image_id", "height", "width") if key in record}
        pairs += [
            {**image, "label_file_name": segments.file_name, "label": label, "noun": classes[k]}
            for label, k in zip(segments.labels, segments.classes, strict=True)
        ]
    return pairs


def register_mask_pairs(name: str, source: str, image_root: str = "") -> None:
    """Register pairs as a data set, one dict a pair.

    Args:
        name: of the data set.
        source: a pair file, or a registered data set, whose `ground_truth_pairs` are taken.
        image_root: folder of a pair file's images, if they lie elsewhere than beside it.

    Raises:
        FileNotFoundError: the file or the folder is not there.
        ValueError: the name is taken by other data, or the source is neither.
    """
    if source in DatasetCatalog.list():
        load = partial(ground_truth_pairs, source)
    else:
        if not source.endswith((".jsonl", ".parquet")):
            raise ValueError(
                f"mask pairs {name}: {source} is neither a registered data set nor a .jsonl or .parquet file"
            )
        for path in filter(None, (source, image_root)):
            if not os.path.exists(path):
                raise FileNotFoundError(f"mask pairs {name}: {path} is not there")
        load = partial(_load_file, source, image_root or os.path.dirname(source))
    where = ":".join(filter(None, (source, image_root)))
    if name in DatasetCatalog.list():
        if MetadataCatalog.get(name).get("mask_pairs") != where:
            raise ValueError(f"the name {name} is taken by another data set; choose a new one")
        return
    DatasetCatalog.register(name, load)
    MetadataCatalog.get(name).set(mask_pairs=where)


def _load_file(path: str, image_root: str) -> list[Pair]:
    pairs = read_pairs(path)
    if not pairs:
        raise ValueError(f"no pairs in {path}")
    for pair in pairs:
        pair["file_name"] = os.path.join(image_root, pair["file_name"])
    return pairs
