"""Convert full ADE20K to 847 classes (A-847): images with a short side of at most 512, and 16-bit label maps.

Labels are 0 to 846, void is 65535.

Reads ADE20K_2021_17_01/index_ade20k.pkl, for the numbers of the objects, and
ADE20K_2021_17_01/images/ADE/{training,validation}/; writes
ADE20K_2021_17_01/{images,annotations}_detectron2/{training,validation}/.
"""

import sys

from clipdense.clip.vocabulary import near
from clipdense.data.datasets.open_semantic import ADE20K_FULL, WIDE_IGNORE
from clipdense.data.preparation.ade20k import ade20k_full, read_object_names
from clipdense.data.preparation.options import preparation_parser
from clipdense.run.boundary import tool_errors


def main() -> None:
    options = preparation_parser(__doc__, ("training", "validation")).parse_args()
    root = options.root / "ADE20K_2021_17_01"
    names = [name.strip() for name in read_object_names(root / "index_ade20k.pkl")]
    if missing := [name for name in ADE20K_FULL if name not in names]:
        shown = "; ".join(
            f"{name!r} (near: {', '.join(near(name, names)) or 'none'})" for name in missing[:5]
        )
        sys.exit(f"index_ade20k.pkl lacks {len(missing)} of the 847 classes, first {shown}")
    ids = {names.index(name) + 1: i for i, name in enumerate(ADE20K_FULL)}
    for split in options.split:
        count = ade20k_full(root, split, ids, WIDE_IGNORE)
        print(f"{root / 'annotations_detectron2' / split}: {count} images converted")


if __name__ == "__main__":
    with tool_errors("interrupted; the same command continues"):
        main()
