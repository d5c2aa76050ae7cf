"""Pascal VOC 2012 without background (PAS-20): label maps 0..19, with 255 for background and void.

Reads VOC2012/SegmentationClass/ and VOC2012/ImageSets/Segmentation/{train,val}.txt, writes
VOC2012/annotations_detectron2/{train,val}/.
"""

import argparse
import os
from pathlib import Path

import numpy as np

from clipdense.data.preparation import convert_labels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--root",
        type=Path,
        default=os.environ.get("DETECTRON2_DATASETS", "datasets"),
        help="default: %(default)s",
    )
    parser.add_argument("--split", nargs="+", default=["train", "val"])
    options = parser.parse_args()
    root = options.root / "VOC2012"
    for split in options.split:
        names = (root / "ImageSets" / "Segmentation" / f"{split}.txt").read_text("utf-8").split()
        target = root / "annotations_detectron2" / split
        count = convert_labels(
            root / "SegmentationClass",
            target,
            lambda labels: np.where((labels == 0) | (labels == 255), 255, labels - 1),
            names,
        )
        print(f"{target}: {count} files converted")


if __name__ == "__main__":
    main()
