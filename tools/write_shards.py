#!/usr/bin/env python
"""Write webdataset shards of images, captions or mask-category pairs, or index shards that exist.

    tools/write_shards.py --captions data/captions.json:data/images shards/pairs-%05d.tar
    tools/write_shards.py --images data/photos shards/photos-%05d.tar --samples 10000
    tools/write_shards.py --mask-pairs output/mined/pairs.jsonl shards/mined-%05d.tar
    tools/write_shards.py --index "shards/cc12m/{00000..01242}.tar"

The sources are those of DATASETS.IMAGES, CAPTIONS and MASK_PAIRS, without the name. Images are copied
unchanged; those that cannot be read are left out and listed. Beside each shard lies its index (a.tar.index),
which spares a training the reading of all headers. Train with, for example,
DATASETS.CAPTIONS "['pairs:shards/pairs-*.tar']" and DATASETS.TRAIN "['pairs']".
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--images", metavar="SOURCE", help="folder or list")
    source.add_argument("--captions", metavar="SOURCE", help="folder, .json:folder or .jsonl:folder")
    source.add_argument("--mask-pairs", metavar="SOURCE", help="pair file or registered dataset")
    source.add_argument("--index", metavar="SHARDS", help="write the index of these shards only")
    parser.add_argument("output", nargs="?", help="pattern of the shards, with a number: shards/%%05d.tar")
    parser.add_argument(
        "--samples", type=int, default=5000, help="samples of a shard, at most (default: %(default)s)"
    )
    parser.add_argument("--size", type=float, default=1e9, help="bytes of a shard, about (default: 1e9)")
    arguments = parser.parse_args(argv)
    if (arguments.index is None) != (arguments.output is not None):
        parser.error("give the pattern of the shards to write, or --index alone")
    if arguments.samples < 1 or not arguments.size > 0:
        parser.error("--samples and --size must be above 0")
    return arguments


if __name__ == "__main__":
    parse_arguments()  # --help and wrong options end here, before the imports that take seconds

import clipdense.registration  # noqa: F401
from clipdense.data.datasets.own import register_entry
from clipdense.data.remote import expand_pattern
from clipdense.data.shard_writer import write_shards
from clipdense.data.shards import write_index
from clipdense.run.boundary import tool_errors

from detectron2.data import DatasetCatalog

_KEYS = {"IMAGES": "images", "CAPTIONS": "captions", "MASK_PAIRS": "mask_pairs"}
_NAME = "written as shards"


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    if arguments.index is not None:
        shards = expand_pattern(arguments.index)
        print(f"{sum(map(write_index, shards))} images in {len(shards)} shards are indexed")
        return 0
    key, source = next(
        (key, getattr(arguments, name)) for key, name in _KEYS.items() if getattr(arguments, name)
    )
    register_entry(key, f"{_NAME}:{source}")
    count, written, left_out = write_shards(
        DatasetCatalog.get(_NAME), arguments.output, max_samples=arguments.samples, max_bytes=arguments.size
    )
    for name in left_out:
        print(f"left out, not an image that can be read: {name}")
    print(f"{count} samples in {len(written)} shards: {written[0]} to {written[-1]}")
    return 0


if __name__ == "__main__":
    with tool_errors("interrupted; the last shard is incomplete and has no index"):
        sys.exit(main())
