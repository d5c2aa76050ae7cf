"""Convert the label maps of Cityscapes to its 19 classes (0 to 18, void 255), as cityscapesscripts does.

Reads cityscapes/gtFine/{train,val}/*/*_gtFine_labelIds.png, writes *_gtFine_labelTrainIds.png beside them.
"""

from pathlib import Path

import numpy as np
from PIL import Image

from clipdense.data.image import read_labels
from clipdense.data.preparation.files import map_in_threads, save_image
from clipdense.data.preparation.options import preparation_parser
from clipdense.run.boundary import tool_errors

# Published ids of the 19 classes, in order: road, sidewalk, building, ... bicycle.
IDS = [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]
SPLITS = ("train", "val")


def main() -> None:
    options = preparation_parser(__doc__, SPLITS, SPLITS).parse_args()
    table = np.full(256, 255, np.uint8)
    table[IDS] = np.arange(len(IDS))

    def convert(path: Path) -> None:
        save_image(Image.fromarray(table[read_labels(path)]), target(path))

    for split in options.split:
        folder = options.root / "cityscapes" / "gtFine" / split
        paths = sorted(folder.glob("*/*_gtFine_labelIds.png"))
        if not paths:
            raise FileNotFoundError(f"no label maps (*/*_gtFine_labelIds.png) in {folder}")
        count = map_in_threads(convert, [p for p in paths if not target(p).is_file()], str(folder))
        print(f"{folder}: {count} files converted")


def target(path: Path) -> Path:
    return path.with_name(path.name.replace("_labelIds", "_labelTrainIds"))


if __name__ == "__main__":
    with tool_errors("interrupted; the same command continues"):
        main()
