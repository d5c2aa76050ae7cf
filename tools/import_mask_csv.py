#!/usr/bin/env python
"""Convert crops with a painted background, listed in a CSV file, to mask-category pairs with masks.

    tools/import_mask_csv.py coco_proposal_1cap.csv pairs.jsonl --image-root crops

The CSV file has OVSeg's format: tab-separated, with the columns filepath and title. Pixels of exactly RGB
(124, 116, 103) are background; files of a lossy format are therefore refused. Train on the pairs with
DATASETS.MASK_PAIRS "['pairs:pairs.jsonl:crops']" and DATASETS.TRAIN "['pairs']".
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("csv", type=Path, help="list of the crops")
    parser.add_argument("output", type=Path, help="pair file to write, .jsonl or .parquet")
    parser.add_argument(
        "--image-root", type=Path, help="folder of the crops (default: the folder of the list)"
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    parse_arguments()  # --help and wrong options end here, before the imports that take seconds

from tqdm import tqdm

from clipdense.data.mask_pairs import write_pairs
from clipdense.run.boundary import tool_errors
from clipdense.systems.mask_adaptation.keyed_crops import read_keyed_csv, read_keyed_pair


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    root = arguments.csv.parent if arguments.image_root is None else arguments.image_root
    written = 0

    def pairs(rows: list[tuple[str, str]]) -> Iterator[dict[str, Any]]:
        nonlocal written
        for name, noun in tqdm(rows, "Crops", unit="crop"):
            if (pair := read_keyed_pair(name, noun, root)) is not None:
                written += 1
                yield pair

    rows = read_keyed_csv(arguments.csv)
    write_pairs(arguments.output, pairs(rows))
    print(
        f"{written} pairs in {arguments.output}; {len(rows) - written} crops without foreground were skipped"
    )
    return 0


if __name__ == "__main__":
    with tool_errors("interrupted; nothing was written"):
        sys.exit(main())
