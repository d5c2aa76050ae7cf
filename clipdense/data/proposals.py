"""Sources of mask proposals that need no model: annotations of a dataset, a file of masks, a folder of maps.

All follow the protocol `clipdense.open_vocabulary.Proposals`, as OVSeg does.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pycocotools.mask as mask_util
import torch
from torch import Tensor

from clipdense.data.image import read_labels
from clipdense.data.json_files import load_json
from clipdense.data.mask_pairs import labelled_segments
from clipdense.data.validation import DataError, rle_fault

from detectron2.data import DatasetCatalog

__all__ = [
    "RLE",
    "DatasetProposals",
    "FileProposals",
    "FolderProposals",
    "GroundTruthProposals",
    "build_mask_source",
    "encode_mask",
    "ground_truth_masks",
]

NETWORK, GROUND_TRUTH = "network", "ground_truth"

RLE = dict[str, Any]


class GroundTruthProposals:
    """The annotated segments of a dataset as proposals, see `ground_truth_masks`.

    Args:
        records: dataset dicts with segments.
        ignore_label: void in semantic maps.
    """

    def __init__(self, records: Iterable[Mapping[str, Any]], ignore_label: int = 255) -> None:
        self._ignore_label = ignore_label
        self._records = {os.path.abspath(record["file_name"]): record for record in records}

    def propose_masks(self, sample: Mapping[str, Any]) -> Tensor:
        """Return the segments (Q, H, W) bool of an image; none if the dataset does not contain it.

        Args:
            sample: with ``file_name``, and ``height`` and ``width`` in pixels.
        """
        size = sample["height"], sample["width"]
        record = self._records.get(os.path.abspath(sample["file_name"]))
        segments = [] if record is None else ground_truth_masks(record, size, self._ignore_label)
        return _decode([mask for _, mask in segments], size)


class FileProposals:
    """Masks from a JSON file: a list of ``image_id`` and ``segmentation`` (COCO RLE), like COCO's results.

    Args:
        path: of the file.

    Raises:
        FileNotFoundError: If the file does not exist.
        DataError: If the file is not such a list, or a mask is damaged; names file and row.
        ValueError: If the file is not JSON.
    """

    def __init__(self, path: str | Path) -> None:
        self._masks: dict[Any, list[RLE]] = defaultdict(list)
        rows = load_json(path)
        for index, row in enumerate(rows if isinstance(rows, list) else [rows]):
            if (
                not isinstance(row, dict)
                or not isinstance(row.get("image_id"), int | str)
                or not isinstance(row.get("segmentation"), dict)
            ):
                polygons = isinstance(row, dict) and isinstance(row.get("segmentation"), list)
                found = "polygons instead of run lengths" if polygons else str(row)[:60]
                raise DataError(
                    f"{path}: not a JSON list of image_id and segmentation (COCO RLE); row {index}: {found}"
                )
            if fault := rle_fault(row["segmentation"]):
                raise DataError(f"{path}, row {index} (image {row['image_id']!r}): {fault}")
            self._masks[row["image_id"]].append(_compress(row["segmentation"], None))

    def propose_masks(self, sample: Mapping[str, Any]) -> Tensor:
        """Return the masks (Q, H, W) bool of an image; none if the file does not contain it.

        Args:
            sample: with ``file_name``, ``image_id``, and ``height`` and ``width`` in pixels.

        Raises:
            ValueError: If the masks have another size than the image.
        """
        size = sample["height"], sample["width"]
        masks = self._masks.get(sample["image_id"], [])
        for mask in masks:
            if tuple(mask["size"]) != size:
                raise ValueError(
                    f"{sample['file_name']} has {size[0]} x {size[1]} pixels, its proposals have "
                    f"{mask['size'][0]} x {mask['size'][1]}"
                )
        return _decode(masks, size)


class DatasetProposals:
    """`GroundTruthProposals` of registered datasets, which are loaded when the first image is seen.

    Args:
        names: registered datasets with segments.
        ignore_label: void in semantic maps.
    """

    def __init__(self, names: Sequence[str], ignore_label: int = 255) -> None:
        self.names, self._ignore_label = tuple(names), ignore_label

    @cached_property
    def _source(self) -> GroundTruthProposals:
        records = [record for name in self.names for record in DatasetCatalog.get(name)]
        return GroundTruthProposals(records, self._ignore_label)

    def propose_masks(self, sample: Mapping[str, Any]) -> Tensor:
        """Return the segments (Q, H, W) bool of an image; see `GroundTruthProposals.propose_masks`."""
        return self._source.propose_masks(sample)


class FolderProposals:
    """Masks from a folder of PNG files.

    The masks of ``name.jpg`` are in ``name.png``, a map whose values above 0 are segments without overlap
    (one channel of 8 or 16 bits, or the RGB ids of COCO panoptic); or in the folder ``name``, one black and
    white PNG file per mask, which may overlap.

    Args:
        folder: of the files.

    Raises:
        FileNotFoundError: If the folder does not exist.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise FileNotFoundError(f"no folder of masks '{folder}'")

    def propose_masks(self, sample: Mapping[str, Any]) -> Tensor:
        """Return the masks (Q, H, W) bool of an image; none if the folder has no file of it.

        Args:
            sample: with ``file_name``, and ``height`` and ``width`` in pixels.

        Raises:
            DataError: If the masks have another size than the image.
        """
        size = sample["height"], sample["width"]
        target = self.folder / Path(sample["file_name"]).stem
        if target.is_dir():
            files = sorted(target.glob("*.png"))
            masks = [_read_map(path, size) > 0 for path in files]
        else:
            path = target.with_name(f"{target.name}.png")
            labels = _read_map(path, size) if path.is_file() else np.zeros(size, np.int64)
            masks = [labels == value for value in np.unique(labels) if value > 0]
        if not masks:
            return torch.zeros(0, *size, dtype=torch.bool)
        return torch.from_numpy(np.stack(masks))


def build_mask_source(
    source: str, datasets: Sequence[str], ignore_label: int = 255
) -> DatasetProposals | FileProposals | FolderProposals | None:
    """Build the source of masks that ``MODEL.MASK_FORMER.TEST.MASK_SOURCE`` names.

    Args:
        source: "network" (no other source), "ground_truth", the path of a JSON file (`FileProposals`), or the
            path of a folder (`FolderProposals`).
        datasets: registered datasets whose annotations "ground_truth" takes.
        ignore_label: void in semantic maps.

    Returns:
        The source; None for "network".

    Raises:
        ValueError: If ground truth is wanted and there are no datasets.
        FileNotFoundError: If the file or folder does not exist.
        DataError: If the file is damaged.
    """
    if source == NETWORK:
        return None
    if source == GROUND_TRUTH:
        if not datasets:
            raise ValueError("MODEL.MASK_FORMER.TEST.MASK_SOURCE ground_truth needs DATASETS.TEST")
        return DatasetProposals(datasets, ignore_label)
    return FolderProposals(source) if Path(source).is_dir() else FileProposals(source)


def _read_map(path: Path, size: tuple[int, int]) -> npt.NDArray[np.int64]:
    labels = np.asarray(read_labels(path), np.int64)
    if labels.shape != size:
        raise DataError(
            f"{path} has {labels.shape[0]} x {labels.shape[1]} pixels, but its image has "
            f"{size[0]} x {size[1]}"
        )
    return labels


def ground_truth_masks(
    record: Mapping[str, Any], size: tuple[int, int], ignore_label: int = 255
) -> list[tuple[int, RLE]]:
    """Return the annotated segments of a dataset dict, without crowds.

    Args:
        record: with panoptic segments, else instances, else a semantic map, whose classes are one segment
            each.
        size: height and width of the image in pixels.
        ignore_label: void in semantic maps.

    Returns:
        (contiguous class id, COCO RLE) of each segment.
    """
    if "annotations" in record and "pan_seg_file_name" not in record:
        return [
            (annotation["category_id"], _compress(annotation["segmentation"], size))
            for annotation in record["annotations"]
            if annotation.get("segmentation") and not annotation.get("iscrowd")
        ]
    segments = labelled_segments(record, ignore_label)
    labels = read_labels(segments.file_name)
    pairs = zip(segments.classes, segments.labels, strict=True)
    return [(label, encode_mask(labels == value)) for label, value in pairs]


def encode_mask(mask: npt.NDArray[np.bool_]) -> RLE:
    """Encode a mask (H, W) as COCO's compressed RLE with text counts."""
    return _compress(mask_util.encode(np.asfortranarray(mask, np.uint8)), None)


def _compress(segmentation: Any, size: tuple[int, int] | None) -> RLE:
    """Convert any COCO segmentation (polygons, full or compressed counts) to compressed RLE."""
    if isinstance(segmentation, list):
        if size is None:
            raise TypeError("polygons instead of run lengths")
        segmentation = mask_util.merge(mask_util.frPyObjects(segmentation, size[0], size[1]))
    elif isinstance(segmentation["counts"], list):
        segmentation = mask_util.frPyObjects(segmentation, *segmentation["size"])
    counts = segmentation["counts"]
    return {
        "size": [int(side) for side in segmentation["size"]],
        "counts": counts.decode("ascii") if isinstance(counts, bytes) else counts,
    }


def _decode(masks: Sequence[RLE], size: tuple[int, int]) -> Tensor:
    if not masks:
        return torch.zeros(0, *size, dtype=torch.bool)
    decoded = mask_util.decode(list(masks))  # (H, W, Q)
    return torch.from_numpy(np.ascontiguousarray(decoded.transpose(2, 0, 1))).bool()
