"""OV-LVIS: LVIS v1's training annotations without those of the 337 rare classes.

Reads lvis/lvis_v1_train.json, writes lvis/lvis_v1_train_seen_1203_cat.json with all images and all 1203
categories. Validation takes lvis/lvis_v1_val.json as it is.
"""

import argparse
import os
from pathlib import Path

from clipdense.data.datasets.open_vocabulary import LVIS_RARE, OV_LVIS_FILES
from clipdense.data.preparation import select_categories


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--root",
        type=Path,
        default=os.environ.get("DETECTRON2_DATASETS", "datasets"),
        help="default: %(default)s",
    )
    folder = parser.parse_args().root / "lvis"
    target = folder / OV_LVIS_FILES[0]
    base = set(range(1, 1204)) - LVIS_RARE
    counts = select_categories(folder / "lvis_v1_train.json", target, base, all_images=True)
    print(f"{target}: " + ("{} images, {} annotations".format(*counts) if counts else "is there already"))


if __name__ == "__main__":
    main()
