"""OV-COCO: annotations of the 48 base classes for training, of all 65 classes for validation.

Reads coco/annotations/instances_{train,val}2017.json, writes beside them instances_train2017_seen_2.json (48
categories), instances_train2017_seen_2_65_cat.json (the same annotations, 65 categories) and
instances_val2017_all_2.json. Images without any annotation of the classes are left out.
"""

import argparse
import os
from pathlib import Path

from clipdense.data.datasets.open_vocabulary import OV_COCO, OV_COCO_BASE
from clipdense.data.preparation import select_categories


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--root",
        type=Path,
        default=os.environ.get("DETECTRON2_DATASETS", "datasets"),
        help="default: %(default)s",
    )
    folder = parser.parse_args().root / "coco" / "annotations"
    base = {k for k, name in OV_COCO.items() if name in OV_COCO_BASE}
    for split, suffix, annotated, listed in (
        ("train", "seen_2", base, base),
        ("train", "seen_2_65_cat", base, OV_COCO),
        ("val", "all_2", OV_COCO, OV_COCO),
    ):
        target = folder / f"instances_{split}2017_{suffix}.json"
        counts = select_categories(folder / f"instances_{split}2017.json", target, annotated, listed)
        print(f"{target}: " + ("{} images, {} annotations".format(*counts) if counts else "is there already"))


if __name__ == "__main__":
    main()
