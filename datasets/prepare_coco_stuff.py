"""Convert COCO-Stuff label maps to 171 classes (0 to 170), to the 156 base classes alone (0 to 155), and to
the 80 things (1 to 80; everything else, and unlabelled pixels, are the background 0).

The published maps hold category ids. Unlabelled pixels become 255. Reads
coco/stuffthingmaps/{train,val}2017/ (stuffthingmaps_trainval2017.zip), writes
coco/stuffthingmaps_detectron2/{train2017,val2017,train2017_base}/ and
coco/objects_detectron2/{train2017,val2017}/.
"""

import numpy as np

from clipdense.data.datasets.open_semantic import (
    COCO_STUFF,
    COCO_STUFF_BASE,
    COCO_STUFF_VALUES,
    NUM_THINGS,
)
from clipdense.data.preparation.labels import convert_labels
from clipdense.data.preparation.options import preparation_parser
from clipdense.run.boundary import tool_errors

SPLITS = ("train2017", "val2017", "train2017_base")
OBJECTS = ("train2017_objects", "val2017_objects")


def main() -> None:
    options = preparation_parser(__doc__, (*SPLITS, *OBJECTS), (*SPLITS, *OBJECTS)).parse_args()
    coco = options.root / "coco"
    for split in options.split:
        if split in OBJECTS:
            table = np.zeros(256, int)
            table[COCO_STUFF_VALUES[:NUM_THINGS]] = np.arange(1, NUM_THINGS + 1)
            source = split.removesuffix("_objects")
            target = coco / "objects_detectron2" / source
            count = convert_labels(coco / "stuffthingmaps" / source, target, table.__getitem__)
            print(f"{target}: {count} files converted")
            continue
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
