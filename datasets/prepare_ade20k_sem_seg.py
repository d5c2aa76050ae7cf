"""ADE20K: label maps 0..149 with 255 for unlabelled, from the published 1..150 with 0 for unlabelled.

Reads ADEChallengeData2016/annotations/, writes ADEChallengeData2016/annotations_detectron2/.
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
    root = parser.parse_args().root / "ADEChallengeData2016"
    for folder in ("training", "validation"):
        source, target = root / "annotations" / folder, root / "annotations_detectron2" / folder
        count = convert_labels(source, target, lambda labels: np.where(labels == 0, 255, labels - 1))
        print(f"{target}: {count} files converted")


if __name__ == "__main__":
    main()
