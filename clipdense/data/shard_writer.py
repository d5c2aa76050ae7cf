"""Writer of shards, tar files of the webdataset library, from datasets of images, captions or mask pairs."""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask as mask_util

from clipdense.data.image import header_size
from clipdense.data.mask_pairs import pair_mask
from clipdense.data.shards import EXTENSIONS, write_index

from detectron2.utils.file_io import PathManager

__all__ = ["write_shards"]

_PAIR_KEYS = ("height", "width", "noun", "score", "caption")


def write_shards(
    records: Iterable[Mapping[str, Any]], pattern: str, *, max_samples: int = 5000, max_bytes: float = 1e9
) -> tuple[int, list[str], list[str]]:
    """Write the images of a dataset, unchanged, and what it knows about them, with an index of each shard.

    Args:
        records: Detectron2's dataset dicts. ``captions`` become the lines of a text file beside the image.
            Mask-category pairs (see `clipdense.data.mask_pairs`) become a JSON list beside it; the pairs of
            an image should follow one another, as each group has a copy of the image.
        pattern: of the tar files, with a number: ``shards/%05d.tar``. The folder is created.
        max_samples: samples of a shard.
        max_bytes: a shard that has reached this size is complete.

    Returns:
        Number of samples, the written files, and the images that were left out as they cannot be read.

    Raises:
        ValueError: If the pattern has no number, does not end in .tar, or names existing files.
    """
    from webdataset import ShardWriter  # slow to import

    try:
        first, second = pattern % 0, pattern % 1
    except (TypeError, ValueError):
        first = second = ""
    if first == second or not pattern.endswith(".tar"):
        raise ValueError(f"{pattern}: expected a pattern such as shards/%05d.tar")
    if os.path.exists(first):
        raise ValueError(f"{first} is already there; choose another pattern, or delete the old shards")
    Path(pattern).parent.mkdir(parents=True, exist_ok=True)
    written: list[str] = []
    left_out: list[str] = []

    def finish(shard: str) -> None:
        write_index(shard)
        written.append(shard)

    with ShardWriter(
        pattern, maxcount=max_samples, maxsize=max_bytes, post=finish, verbose=0, encoder=False
    ) as sink:
        for sample in _samples(records, left_out):
            sink.write({"__key__": f"{sink.total:09d}", **sample})
        count = sink.total
    return count, written, left_out


def _samples(records: Iterable[Mapping[str, Any]], left_out: list[str]) -> Iterator[dict[str, bytes]]:
    """Yield the files of each image by extension."""
    for name, group in groupby(records, lambda record: str(record["file_name"])):
        same = list(group)
        extension = Path(name.partition("?")[0] if "://" not in name else name).suffix.lower()
        if extension not in EXTENSIONS or header_size(name) is None:
            left_out.append(name)
            continue
        with PathManager.open(name, "rb") as file:
            sample = {extension[1:]: file.read()}
        captions = [" ".join(text.split()) for record in same for text in record.get("captions", ())]
        if captions:
            sample["txt"] = "\n".join(captions).encode()
        if "noun" in same[0]:
            sample["json"] = json.dumps([_pair(pair) for pair in same], ensure_ascii=False).encode()
        yield sample


def _pair(pair: Mapping[str, Any]) -> dict[str, Any]:
    """Return a pair as in a pair file, without the file name; masks from label maps become run lengths."""
    segmentation = pair.get("segmentation")
    if segmentation is None:
        segmentation = mask_util.encode(np.asfortranarray(pair_mask(pair), np.uint8))
        segmentation["counts"] = segmentation["counts"].decode()
    height, width = segmentation["size"]
    kept = {key: pair[key] for key in _PAIR_KEYS if key in pair}
    return {"height": height, "width": width, **kept, "segmentation": segmentation}
