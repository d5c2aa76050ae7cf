"""Datasets of mask-category pairs: pair files, shards, or the annotated segments of another dataset."""

import json
import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from clipdense.data.datasets.registration import register_once
from clipdense.data.image import BadSampleError
from clipdense.data.mask_pairs import Pair, ground_truth_pairs, pair_fault, read_pairs
from clipdense.data.shards import ShardSample, open_shards, shard_records

from detectron2.data import DatasetCatalog

__all__ = ["register_mask_pairs"]


def register_mask_pairs(name: str, source: str, image_root: str = "") -> None:
    """Register mask-category pairs as a dataset with one record for each pair.

    Args:
        name: of the dataset.
        source: one of three. A pair file (``.jsonl`` or ``.parquet``). Tar files of the webdataset library,
            where each image has a JSON file of the same name with a list of pairs as in a pair file, without
            ``file_name``; see `clipdense.data.shards`. A registered dataset, see `ground_truth_pairs`.
        image_root: folder of the images of a pair file (default: the folder of the file).

    Raises:
        FileNotFoundError: If the file, the folder or a shard does not exist.
        ValueError: If the name is in use, or the source is neither a dataset nor a pair file nor shards.
    """
    load: Callable[[], Sequence[dict[str, Any]]]
    if source in DatasetCatalog.list():
        load = partial(ground_truth_pairs, source)
    elif source.endswith(".tar"):
        load = partial(shard_records, open_shards(name, source), ".json", _shard_record)
    else:
        if not source.endswith((".jsonl", ".parquet")):
            raise ValueError(
                f"mask pairs {name}: {source} is neither a registered dataset nor a .jsonl, .parquet or .tar "
                "file"
            )
        for path in filter(None, (source, image_root)):
            if not os.path.exists(path):
                raise FileNotFoundError(f"mask pairs {name}: {path} does not exist")
        load = partial(_load_file, source, image_root or os.path.dirname(source))
    entry = ":".join(filter(None, (source, image_root)))
    register_once(name, load, {"mask_pairs": entry}, {"lazy": source.endswith(".tar")})


def _shard_record(index: int, sample: ShardSample) -> Pair:
    where = f"{sample.file_name}, pair {sample.item}"
    try:
        pair = {**json.loads(sample.read_text())[sample.item], "file_name": sample.file_name}
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise BadSampleError(f"{where}: not a pair in a JSON list ({error})") from error
    if fault := pair_fault(pair):
        raise BadSampleError(f"{where}: {fault}")
    return {key: value for key, value in pair.items() if value is not None}


def _load_file(path: str, image_root: str) -> list[Pair]:
    pairs = read_pairs(path)
    if not pairs:
        raise ValueError(f"no pairs in {path}")
    for pair in pairs:
        pair["file_name"] = os.path.join(image_root, pair["file_name"])
    return pairs
