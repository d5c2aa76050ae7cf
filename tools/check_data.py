"""Check datasets: structure, ids, boxes, masks, image files and label maps.

    python tools/check_data.py birds/train.json --images birds/images
    python tools/check_data.py panoptic.json --kind panoptic
    python tools/check_data.py birds/data.yaml --sheet sheet.png     # YOLO; or a folder of a known format
    python tools/check_data.py --dataset shapes_closed_val --thorough
    python tools/check_data.py --config-file my.yaml                 # the datasets that the config names

Prints classes, counts, sizes, what was repaired or noticed, and what is refused, each with examples and a
remedy; ``clipdense data check`` does the same. The exit status is 1 if anything is refused. Every training
and evaluation runs the same check first.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from clipdense.run.boundary import tool_errors


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("path", nargs="?", type=Path, help="annotation file, data.yaml or folder")
    parser.add_argument("--images", type=Path, metavar="FOLDER", help="folder of its images")
    parser.add_argument("--panoptic", type=Path, metavar="FOLDER", help="PNGs of a COCO panoptic file")
    parser.add_argument("--classes", type=Path, metavar="FILE", help="class names of label maps")
    parser.add_argument(
        "--kind", choices=("instances", "lvis", "captions", "panoptic"), help="layout of a COCO file"
    )
    parser.add_argument("--sheet", type=Path, metavar="PNG", help="contact sheet to draw")
    parser.add_argument("--dataset", nargs="+", default=[], metavar="NAME", help="registered datasets")
    parser.add_argument(
        "--config-file", metavar="FILE", help="check DATASETS.TRAIN and DATASETS.TEST of a .yaml file"
    )
    parser.add_argument("--thorough", action="store_true", help="open every image, not some hundreds")
    parser.add_argument("opts", nargs="*", default=[], help="with --config-file: KEY VALUE overrides")
    args = parser.parse_args(argv)
    if args.path is None and not args.dataset and not args.config_file:
        parser.error("name an annotation file or folder, --dataset or --config-file")

    # after the arguments: these take seconds to import
    from clipdense.data.datasets.recognise import Hints
    from clipdense.run.data_check import check_path, check_registered

    results = []
    if args.path is not None:
        hints = Hints(args.images, args.panoptic, args.classes)
        results.append(check_path(args.path, hints, kind=args.kind, thorough=args.thorough, sheet=args.sheet))
    if args.dataset or args.config_file:
        results.append(
            check_registered(args.dataset, args.config_file or "", args.opts, thorough=args.thorough)
        )
    for result in results:
        print("\n".join(result.lines))
    return int(any(result.faulty for result in results))


if __name__ == "__main__":
    with tool_errors():
        sys.exit(main())
