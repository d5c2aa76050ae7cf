"""Convert ADE20K label maps from 1 to 150 (0 is unlabelled) to 0 to 149 (255 is unlabelled).

Reads ADEChallengeData2016/annotations/, writes ADEChallengeData2016/annotations_detectron2/.
"""

import numpy as np

from clipdense.data.preparation.labels import convert_labels
from clipdense.data.preparation.options import preparation_parser
from clipdense.run.boundary import tool_errors


def main() -> None:
    root = preparation_parser(__doc__).parse_args().root / "ADEChallengeData2016"
    for folder in ("training", "validation"):
        source, target = root / "annotations" / folder, root / "annotations_detectron2" / folder
        count = convert_labels(source, target, lambda labels: np.where(labels == 0, 255, labels - 1))
        print(f"{target}: {count} files converted")


if __name__ == "__main__":
    with tool_errors("interrupted; the same command continues"):
        main()
