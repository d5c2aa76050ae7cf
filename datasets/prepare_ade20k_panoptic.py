"""ADE20K: panoptic and instance annotations, from the published semantic and instance label maps.

Reads ADEChallengeData2016/annotations/ and annotations_instance/ (a download of its own:
annotations_instance.tar), writes ade20k_panoptic_{train,val}/, ade20k_panoptic_{train,val}.json and
ade20k_instance_{train,val}.json beside them.
"""

import argparse
import os
from pathlib import Path

from clipdense.data.datasets.standard import ADE20K_CLASSES, ADE20K_THINGS
from clipdense.data.preparation import ade20k_panoptic


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--root",
        type=Path,
        default=os.environ.get("DETECTRON2_DATASETS", "datasets"),
        help="default: %(default)s",
    )
    root = parser.parse_args().root / "ADEChallengeData2016"
    for folder, split in (("training", "train"), ("validation", "val")):
        ade20k_panoptic(root, folder, split, ADE20K_THINGS, ADE20K_CLASSES)
        print(f"{root / f'ade20k_panoptic_{split}.json'}: done")


if __name__ == "__main__":
    main()
