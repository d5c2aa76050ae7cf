"""Semantic label maps from COCO-format panoptic annotations: classes in order of category id from 0, 255
elsewhere.

Without further arguments: COCO 2017, coco/panoptic_{train,val}2017/ -> coco/panoptic_semseg_{train,val}2017/
(133 classes).
"""

import argparse
import os
from pathlib import Path

from clipdense.data.preparation import panoptic_to_semantic


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--root",
        type=Path,
        default=os.environ.get("DETECTRON2_DATASETS", "datasets"),
        help="default: %(default)s",
    )
    parser.add_argument("--split", nargs="+", default=["train", "val"], help="of COCO 2017")
    parser.add_argument("--json", type=Path, help="other data: the panoptic json file")
    parser.add_argument("--panoptic", type=Path, help="other data: the folder of panoptic PNGs")
    parser.add_argument("--output", type=Path, help="other data: the folder to write")
    options = parser.parse_args()
    own = (options.json, options.panoptic, options.output)
    if any(own) and not all(own):
        parser.error("--json, --panoptic and --output belong together")
    coco = options.root / "coco"
    jobs = (
        [own]
        if all(own)
        else [
            (
                coco / "annotations" / f"panoptic_{split}2017.json",
                coco / f"panoptic_{split}2017",
                coco / f"panoptic_semseg_{split}2017",
            )
            for split in options.split
        ]
    )
    for panoptic_json, panoptic_root, target in jobs:
        print(f"{target}: {panoptic_to_semantic(panoptic_json, panoptic_root, target)} files written")


if __name__ == "__main__":
    main()
