"""ADE20K with 847 classes (A-847): images with a short side of at most 512 pixels, and 16-bit label maps
0..846 with 65535 for what is no class.

Reads ADE20K_2021_17_01/index_ade20k.pkl, for the numbers of the objects, and
ADE20K_2021_17_01/images/ADE/{training,validation}/; writes
ADE20K_2021_17_01/{images,annotations}_detectron2/{training,validation}/.
"""

import argparse
import os
import sys
from pathlib import Path

from clipdense.clip.vocabulary import near
from clipdense.data.datasets.open_semantic import ADE20K_FULL, WIDE_IGNORE
from clipdense.data.preparation import ade20k_full, read_object_names


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--root",
        type=Path,
        default=os.environ.get("DETECTRON2_DATASETS", "datasets"),
        help="default: %(default)s",
    )
    parser.add_argument("--split", nargs="+", default=["training", "validation"])
    options = parser.parse_args()
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
    main()
