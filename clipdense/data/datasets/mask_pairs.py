"""Datasets of mask-category pairs: pair files, or the annotated segments of another dataset."""

import os
from functools import partial

from clipdense.data.datasets.registration import register_once
from clipdense.data.mask_pairs import Pair, ground_truth_pairs, read_pairs

from detectron2.data import DatasetCatalog

__all__ = ["register_mask_pairs"]


def register_mask_pairs(name: str, source: str, image_root: str = "") -> None:
    """Register mask-category pairs as a dataset with one record for each pair.

    Args:
        name: of the dataset.
        source: a pair file (``.jsonl`` or ``.parquet``), or a registered dataset, see `ground_truth_pairs`.
        image_root: folder of the images of a pair file (default: the folder of the file).

    Raises:
        FileNotFoundError: If the file or the folder does not exist.
        ValueError: If the name is in use, or the source is neither a dataset nor a pair file.
    """
    if source in DatasetCatalog.list():
        load = partial(ground_truth_pairs, source)
    else:
        if not source.endswith((".jsonl", ".parquet")):
            raise ValueError(
                f"mask pairs {name}: {source} is neither a registered dataset nor a .jsonl or .parquet file"
            )
        for path in filter(None, (source, image_root)):
            if not os.path.exists(path):
                raise FileNotFoundError(f"mask pairs {name}: {path} does not exist")
        load = partial(_load_file, source, image_root or os.path.dirname(source))
    register_once(name, load, {"mask_pairs": ":".join(filter(None, (source, image_root)))})


def _load_file(path: str, image_root: str) -> list[Pair]:
    pairs = read_pairs(path)
    if not pairs:
        raise ValueError(f"no pairs in {path}")
    for pair in pairs:
        pair["file_name"] = os.path.join(image_root, pair["file_name"])
    return pairs
