"""PASCAL-Context: label maps of 59 classes (PC-59: 8-bit, void 255) and of 459 (PC-459: 16-bit, void 65535).

Reads VOC2010/trainval/*.mat (trainval.tar.gz of PASCAL-Context) and VOC2010/ImageSets/Main/{train,val}.txt,
writes VOC2010/annotations_detectron2/pc{59,459}_{train,val}/.
"""

import argparse
import os
from pathlib import Path

import numpy as np

from clipdense.data.datasets.open_semantic import PASCAL_CONTEXT_59, PASCAL_CONTEXT_459, WIDE_IGNORE
from clipdense.data.preparation import convert_labels, read_matlab_labels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--root",
        type=Path,
        default=os.environ.get("DETECTRON2_DATASETS", "datasets"),
        help="default: %(default)s",
    )
    parser.add_argument("--split", nargs="+", default=["train", "val"])
    parser.add_argument(
        "--lists",
        type=Path,
        metavar="DIR",
        help="folder of <split>.txt, a name a line, for other splits than VOC2010/ImageSets/Main",
    )
    options = parser.parse_args()
    root = options.root / "VOC2010"
    lists = options.lists or root / "ImageSets" / "Main"
    for split in options.split:
        names = (lists / f"{split}.txt").read_text("utf-8").split()
        for classes, void in ((PASCAL_CONTEXT_59, 255), (PASCAL_CONTEXT_459, WIDE_IGNORE)):
            # published: 0 unlabelled, 1..459 in the order of the 459
            table = np.full(1 + len(PASCAL_CONTEXT_459), void)
            for i, name in enumerate(classes):
                table[1 + PASCAL_CONTEXT_459.index(name)] = i
            target = root / "annotations_detectron2" / f"pc{len(classes)}_{split}"
            count = convert_labels(
                root / "trainval",
                target,
                table.__getitem__,
                names,
                suffix=".mat",
                read=read_matlab_labels,
                wide=void == WIDE_IGNORE,
            )
            print(f"{target}: {count} files converted")


if __name__ == "__main__":
    main()
