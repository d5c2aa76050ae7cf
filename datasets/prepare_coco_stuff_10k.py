"""Convert the label maps of COCO-Stuff 10k to 171 classes (0 to 170, unlabelled 255).

Reads coco_stuff10k/annotations/*.mat and coco_stuff10k/imageLists/{train,test}.txt (cocostuff-10k-v1.1.zip),
writes coco_stuff10k/annotations_detectron2/{train,test}/.
"""

from pathlib import Path

import numpy as np

from clipdense.data.datasets.open_semantic import COCO_STUFF_VALUES
from clipdense.data.preparation.labels import Labels, convert_labels
from clipdense.data.preparation.matlab import read_matrix
from clipdense.data.preparation.options import preparation_parser
from clipdense.files import read_text
from clipdense.run.boundary import tool_errors

SPLITS = ("train", "test")


def read_stuff(path: Path) -> Labels:
    """Read the category ids (H, W) of an image, 0 for unlabelled pixels."""
    return read_matrix(path, "S").astype(np.int64)


def main() -> None:
    options = preparation_parser(__doc__, SPLITS, SPLITS).parse_args()
    root = options.root / "coco_stuff10k"
    table = np.full(1 + max(COCO_STUFF_VALUES) + 1, 255)
    for i, value in enumerate(COCO_STUFF_VALUES):
        table[1 + value] = i
    for split in options.split:
        names = read_text(root / "imageLists" / f"{split}.txt").split()
        target = root / "annotations_detectron2" / split
        count = convert_labels(
            root / "annotations", target, table.__getitem__, names, suffix=".mat", read=read_stuff
        )
        print(f"{target}: {count} files converted")


if __name__ == "__main__":
    with tool_errors("interrupted; the same command continues"):
        main()
