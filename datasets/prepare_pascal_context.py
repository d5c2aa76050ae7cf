"""Convert PASCAL-Context to label maps of 59 classes (8-bit, void 255), of these and background (8-bit), and
of 459 classes (16-bit, void 65535).

Reads VOC2010/trainval/*.mat (trainval.tar.gz of PASCAL-Context) and VOC2010/ImageSets/Main/{train,val}.txt,
writes VOC2010/annotations_detectron2/pc{59,60,459}_{train,val}/.
"""

from pathlib import Path

import numpy as np

from clipdense.data.datasets.open_semantic import (
    PASCAL_CONTEXT_59,
    PASCAL_CONTEXT_60,
    PASCAL_CONTEXT_459,
    WIDE_IGNORE,
)
from clipdense.data.preparation.labels import convert_labels, read_matlab_labels
from clipdense.data.preparation.options import preparation_parser
from clipdense.files import read_text
from clipdense.run.boundary import tool_errors


def main() -> None:
    parser = preparation_parser(__doc__, ("train", "val"))
    parser.add_argument(
        "--lists",
        type=Path,
        metavar="DIR",
        help="folder of <split>.txt files, one image name a line (default: VOC2010/ImageSets/Main)",
    )
    options = parser.parse_args()
    root = options.root / "VOC2010"
    lists = options.lists or root / "ImageSets" / "Main"
    for split in options.split:
        names = read_text(lists / f"{split}.txt").split()
        for classes, others in (
            (PASCAL_CONTEXT_59, 255),
            (PASCAL_CONTEXT_60, 0),
            (PASCAL_CONTEXT_459, WIDE_IGNORE),
        ):
            # published labels: 0 is unlabelled, 1 to 459 are the 459 classes in order
            table = np.full(1 + len(PASCAL_CONTEXT_459), others)
            for i, name in enumerate(classes):
                if name != "background":
                    table[1 + PASCAL_CONTEXT_459.index(name)] = i
            target = root / "annotations_detectron2" / f"pc{len(classes)}_{split}"
            count = convert_labels(
                root / "trainval",
                target,
                table.__getitem__,
                names,
                suffix=".mat",
                read=read_matlab_labels,
                wide=others == WIDE_IGNORE,
            )
            print(f"{target}: {count} files converted")


if __name__ == "__main__":
    with tool_errors("interrupted; the same command continues"):
        main()
