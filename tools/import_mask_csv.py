#!/usr/bin/env python
"""Turn crops with a painted background, listed in a CSV, into mask-category pairs that have their masks.

    tools/import_mask_csv.py coco_proposal_1cap.csv pairs.jsonl --image-root crops

The CSV is OVSeg's: tab-separated, with the columns filepath and title. What is exactly of RGB (124, 116, 103)
is background, so files of a lossy format are refused. Train on the pairs with
DATASETS.MASK_PAIRS "['pairs:pairs.jsonl:crops']" and DATASETS.TRAIN "['pairs']".
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from clipdense.data.mask_pairs import write_pairs
from clipdense.systems.mask_adaptation.keyed_crops import read_keyed_csv, read_keyed_pair


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("csv", type=Path, help="the list of crops")
    parser.add_argument("output", type=Path, help="file to write, .jsonl or .parquet")
    parser.add_argument("--image-root", type=Path, help="folder of the crops (default: the list's)")
    arguments = parser.parse_args(argv)
    root = arguments.csv.parent if arguments.image_root is None else arguments.image_root
    written = 0

    def pairs(rows: list[tuple[str, str]]) -> Iterator[dict[str, Any]]:
        nonlocal written
        for name, noun in tqdm(rows, "Crops", unit="crop"):
            if (pair := read_keyed_pair(name, noun, root)) is not None:
                written += 1
                yield pair

    try:
        rows = read_keyed_csv(arguments.csv)
        write_pairs(arguments.output, pairs(rows))
    except (OSError, ValueError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{written} pairs in {arguments.output}; {len(rows) - written} crops were all background")
    return 0


if __name__ == "__main__":
    sys.exit(main())
