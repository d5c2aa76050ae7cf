"""Mask-category pairs: image regions, each with a noun, read from pair files or from annotated segments.

OVSeg adapts CLIP to masked crops with them (Liang et al., CVPR 2023, section 3.2). Masks are stored as run
lengths and never inferred from the colours of a crop.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pycocotools.mask as mask_util
from tqdm import tqdm

from clipdense.data.image import read_labels
from clipdense.data.parquet import require_pyarrow
from clipdense.data.validation import rle_fault
from clipdense.files import atomic_path

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils import comm

__all__ = [
    "LabelledSegments",
    "Pair",
    "check_pair_file",
    "ground_truth_pairs",
    "labelled_segments",
    "pair_fault",
    "pair_mask",
    "read_pairs",
    "segment_classes",
    "write_pairs",
]

Pair = dict[str, Any]

_REQUIRED = ("file_name", "height", "width", "segmentation", "noun")


def read_pairs(path: str | Path) -> list[Pair]:
    """Read a pair file.

    Args:
        path: ``.jsonl`` with one pair a line, or ``.parquet`` with one pair a row.

    Returns:
        Dicts with ``file_name`` (of the image, relative as in the file), ``height`` and ``width`` in pixels,
        ``segmentation`` (COCO's compressed run lengths: ``size``, and ``counts`` as text) and ``noun``.
        ``score``, ``image_id`` and ``caption`` are included if the file has them.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If the suffix is unknown, the file is damaged, or a pair lacks one of the first five
            entries; names the line.
        ImportError: If the file is parquet and the package pyarrow is not installed.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no pair file {path}")
    pairs: list[Pair] = []
    for number, pair in enumerate(_rows(path), 1):
        if fault := pair_fault(pair):
            raise ValueError(f"{path}, pair {number} ({pair.get('file_name')}): {fault}")
        pairs.append({key: value for key, value in pair.items() if value is not None})
    return pairs


def pair_fault(pair: Mapping[str, Any]) -> str | None:
    """Describe what is wrong with the entries of a pair, or that some are missing; or return None.

    The mask is checked here as pycocotools leaves uninitialised memory in one whose runs are too short.
    """
    if missing := [key for key in _REQUIRED if pair.get(key) is None]:
        return f"it lacks {', '.join(missing)}"
    for key in ("file_name", "noun"):
        if not isinstance(pair[key], str) or not pair[key].strip():
            return f"{key} is {pair[key]!r}, not text"
    for key in ("height", "width"):
        if not isinstance(pair[key], int) or isinstance(pair[key], bool) or pair[key] < 1:
            return f"{key} is {pair[key]!r}, not a number of pixels"
    if not isinstance(pair["segmentation"], dict):
        return "segmentation is not a run-length encoding (size and counts)"
    return rle_fault(pair["segmentation"], pair["height"], pair["width"])


def check_pair_file(path: str | Path) -> None:
    """Check the name of a pair file.

    Raises:
        ValueError: If the suffix is neither ``.jsonl`` nor ``.parquet``.
        ImportError: If the suffix is ``.parquet`` and the package pyarrow is not installed.
    """
    suffix = Path(path).suffix
    if suffix not in (".jsonl", ".parquet"):
        raise ValueError(f"{path}: pair files end in .jsonl or .parquet")
    if suffix == ".parquet":
        require_pyarrow(path)


def write_pairs(path: str | Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Write a pair file for `read_pairs`, atomically.

    Raises:
        ValueError: If the suffix is neither ``.jsonl`` nor ``.parquet``.
        ImportError: If the suffix is ``.parquet`` and the package pyarrow is not installed.
    """
    path = Path(path)
    check_pair_file(path)
    with atomic_path(path) as partial_path:
        if path.suffix == ".jsonl":
            with partial_path.open("w", encoding="utf-8") as file:
                for record in records:
                    file.write(json.dumps(record, ensure_ascii=False) + "\n")
        else:
            arrow, parquet = require_pyarrow(path)
            rows = list(records)
            columns = list(dict.fromkeys(key for row in rows for key in row))  # the first may lack some
            table = arrow.Table.from_pylist([{key: row.get(key) for key in columns} for row in rows])
            parquet.write_table(table, partial_path)


def _rows(path: Path) -> Iterator[Pair]:
    check_pair_file(path)
    if path.suffix == ".parquet":
        _, parquet = require_pyarrow(path)
        try:
            file = parquet.ParquetFile(path)
            for batch in file.iter_batches():
                yield from batch.to_pylist()
        except Exception as error:  # pyarrow has many for damaged files
            raise ValueError(f"{path}: not a parquet file, or a damaged one ({error})") from error
        return
    with path.open("rb") as lines:  # JSON finds the encoding, and its errors belong to a line
        for number, line in enumerate(lines, 1):
            try:
                pair = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}, line {number}: not JSON ({error})") from error
            if not isinstance(pair, dict):
                raise ValueError(f"{path}, line {number}: expected a pair as a JSON object")
            yield pair


def pair_mask(pair: Mapping[str, Any]) -> npt.NDArray[np.bool_]:
    """Decode the mask (H, W) of a pair from a file or from `ground_truth_pairs`.

    Raises:
        ValueError: If the run lengths are damaged; names the image and the noun.
    """
    if "segmentation" not in pair:
        return read_labels(pair["label_file_name"]) == pair["label"]
    rle = pair["segmentation"]
    if fault := rle_fault(rle):
        raise ValueError(f"{pair['file_name']}: the mask of {pair['noun']!r} is damaged ({fault})")
    if isinstance(rle["counts"], list):
        rle = mask_util.frPyObjects(rle, *rle["size"])
    mask: npt.NDArray[np.uint8] = mask_util.decode(rle)
    return mask.astype(bool)


@dataclass(frozen=True)
class LabelledSegments:
    """Annotated segments of one image.

    Attributes:
        file_name: label map, for `read_labels`.
        labels: value of each segment in the label map.
        classes: contiguous class id of each segment.
    """

    file_name: str
    labels: list[int]
    classes: list[int]


def labelled_segments(record: Mapping[str, Any], ignore_label: int = 255) -> LabelledSegments:
    """Return the segments of a dataset dict: panoptic segments without crowds, else one for each class of a
    semantic map.

    Raises:
        ValueError: If the record has neither.
    """
    if "pan_seg_file_name" in record:
        segments = [s for s in record["segments_info"] if not s.get("iscrowd", 0)]
        return LabelledSegments(
            record["pan_seg_file_name"], [s["id"] for s in segments], [s["category_id"] for s in segments]
        )
    if "sem_seg_file_name" not in record:
        raise ValueError(
            f"{record.get('file_name')}: its dataset has neither panoptic nor semantic segmentations"
        )
    present = np.unique(read_labels(record["sem_seg_file_name"])).tolist()
    classes = [label for label in present if label != ignore_label]
    return LabelledSegments(record["sem_seg_file_name"], classes, classes)


def segment_classes(name: str) -> list[str]:
    """Return the class names of a dataset's segments, in order of contiguous id.

    Raises:
        ValueError: If ``stuff_classes`` does not contain them all (Detectron2's separated panoptic datasets
            label all things as one class).
    """
    classes = [c.strip() for c in MetadataCatalog.get(name).get("stuff_classes") or ()]
    if not classes or classes[0] == "things":
        raise ValueError(f"dataset {name} does not list things and stuff together in stuff_classes")
    return classes


def ground_truth_pairs(name: str) -> list[Pair]:
    """Return the annotated segments of a registered dataset, each with its class name.

    Only labelled segments give pairs: a dataset that labels base classes alone gives no pair of a novel one.

    Returns:
        Pairs as from `read_pairs`, except the mask: the pixels where ``label_file_name`` has value ``label``.

    Raises:
        ValueError: If the dataset has neither panoptic nor semantic segmentations, or see `segment_classes`.
    """
    records, classes, pairs = DatasetCatalog.get(name), segment_classes(name), []
    ignore = MetadataCatalog.get(name).get("ignore_label", 255)
    semantic = not any("pan_seg_file_name" in record for record in records[:1])
    quiet = not semantic or not comm.is_main_process()  # only semantic maps are read, which takes time
    for record in tqdm(records, f"Segments of {name}", unit="image", disable=True if quiet else None):
        segments = labelled_segments(record, ignore)
        image = {key: record[key] for key in ("file_name", "image_id", "height", "width") if key in record}
        pairs += [
            {**image, "label_file_name": segments.file_name, "label": label, "noun": classes[k]}
            for label, k in zip(segments.labels, segments.classes, strict=True)
        ]
    return pairs
