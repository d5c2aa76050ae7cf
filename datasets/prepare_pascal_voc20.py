"""Convert Pascal VOC 2012 to label maps without background (PAS-20): 0 to 19; background and void become 255.

Reads VOC2012/SegmentationClass/ and VOC2012/ImageSets/Segmentation/{train,val}.txt, writes
VOC2012/annotations_detectron2/{train,val}/.
"""

import numpy as np

from clipdense.data.preparation.labels import convert_labels
from clipdense.data.preparation.options import preparation_parser
from clipdense.files import read_text
from clipdense.run.boundary import tool_errors


def main() -> None:
    options = preparation_parser(__doc__, ("train", "val")).parse_args()
    root = options.root / "VOC2012"
    for split in options.split:
        names = read_text(root / "ImageSets" / "Segmentation" / f"{split}.txt").split()
        target = root / "annotations_detectron2" / split
        count = convert_labels(
            root / "SegmentationClass",
            target,
            lambda labels: np.where((labels == 0) | (labels == 255), 255, labels - 1),
            names,
        )
        print(f"{target}: {count} files converted")


if __name__ == "__main__":
    with tool_errors("interrupted; the same command continues"):
        main()
