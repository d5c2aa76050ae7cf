"""Convert COCO-Stuff label maps to 171 classes (0 to 170), and to the 156 base classes alone (0 to 155).

The published maps hold category ids. Unlabelled pixels become 255. Reads
coco/stuffthingmaps/{train,val}2017/ (stuffthingmaps_trainval2017.zip), writes
coco/stuffthingmaps_detectron2/{train2017,val2017,train2017_base}/.
"""

import numpy as np

from clipdense.data.datasets.open_semantic import COCO_STUFF, COCO_STUFF_BASE, COCO_STUFF_VALUES
from clipdense.data.preparation.labels import convert_labels
from clipdense.data.preparation.options import preparation_parser
from clipdense.run.boundary import tool_errors

SPLITS = ("train2017", "val2017", "train2017_base")


def main() -> None:
    options = preparation_parser(__doc__, SPLITS, SPLITS).parse_args()
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
    with tool_errors("interrupted; the same command continues"):
        main()
