"""Convert COCO panoptic annotations to semantic label maps: classes in order of category id from 0, void 255.

By default it converts COCO 2017 (133 classes): reads coco/panoptic_{train,val}2017/, writes
coco/panoptic_semseg_{train,val}2017/.
"""

from pathlib import Path

from clipdense.data.preparation.labels import panoptic_to_semantic
from clipdense.data.preparation.options import preparation_parser
from clipdense.run.boundary import tool_errors


def main() -> None:
    parser = preparation_parser(__doc__, ("train", "val"))
    parser.add_argument("--json", type=Path, help="own data: panoptic JSON file")
    parser.add_argument("--panoptic", type=Path, help="own data: folder of the panoptic PNGs")
    parser.add_argument("--output", type=Path, help="own data: folder to write")
    options = parser.parse_args()
    own = (options.json, options.panoptic, options.output)
    if any(own) and not all(own):
        parser.error("give --json, --panoptic and --output together")
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
    with tool_errors("interrupted; the same command continues"):
        main()
