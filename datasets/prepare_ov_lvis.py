"""Select the training annotations of OV-LVIS: LVIS v1 without the 337 rare classes.

Reads lvis/lvis_v1_train.json, writes lvis/lvis_v1_train_seen_1203_cat.json with all images and all 1203
categories. Validation uses lvis/lvis_v1_val.json unchanged.
"""

from clipdense.data.datasets.open_vocabulary import LVIS_RARE, OV_LVIS_FILES
from clipdense.data.preparation.categories import select_categories
from clipdense.data.preparation.options import preparation_parser
from clipdense.run.boundary import tool_errors


def main() -> None:
    folder = preparation_parser(__doc__).parse_args().root / "lvis"
    target = folder / OV_LVIS_FILES[0]
    base = set(range(1, 1204)) - LVIS_RARE
    counts = select_categories(folder / "lvis_v1_train.json", target, base, all_images=True)
    print(f"{target}: " + ("{} images, {} annotations".format(*counts) if counts else "exists already"))


if __name__ == "__main__":
    with tool_errors("interrupted; the same command continues"):
        main()
