"""COCO-Stuff: label maps 0..170 with 255 for unlabelled, and 0..155 of the base classes alone, from the
published category ids.

Reads coco/stuffthingmaps/{train,val}2017/ (stuffthingmaps_trainval2017.zip), writes
coco/stuffthingmaps_detectron2/{train2017,val2017,train2017_base}/.
"""

import argparse
import os
from pathlib import Path

import numpy as np

from clipdense.data.datasets.open_semantic import COCO_STUFF, COCO_STUFF_BASE, COCO_STUFF_VALUES
from clipdense.data.preparation import convert_labels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--root",
        type=Path,
        default=os.environ.get("DETECTRON2_DATASETS", "datasets"),
        help="default: %(default)s",
    )
    parser.add_argument(
        "--split",
        nargs="+",
        default=["train2017", "val2017", "train2017_base"],
        choices=["train2017", "val2017", "train2017_base"],
    )
    options = parser.parse_args()
    coco = options.root / "coco"
    for split in options.split:
        classes = COCO_STUFF_BASE if split.endswith("_base") else COCO_STUFF
        table = np.full(256, 255)
        for value, name in zip(COCO_STUFF_VALUES, COCO_STUFF, strict=True):
            if name in classes:
                table[value] = classes.index(name)
        source, target = split.removesuffix("_base"), coco / "stuffthingmaps_detectron2" / split
        count = convert_labels(coco / "stuffthingmaps" / source, target, table.__getitem__)
        print(f"{target}: {count} files converted")


if __name__ == "__main__":
    main()
