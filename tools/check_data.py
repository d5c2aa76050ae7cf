"""Check datasets: structure, ids, boxes, masks, image files and label maps.

    python tools/check_data.py birds/train.json --images birds/images
    python tools/check_data.py panoptic.json --kind panoptic
    python tools/check_data.py --dataset shapes_closed_val --thorough
    python tools/check_data.py --config-file my.yaml                 # the datasets that the config names

Prints counts, what was repaired or noticed, and what is refused, each with examples and a remedy. The exit
status is 1 if anything is refused. Every training and evaluation runs the same check first.
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
    parser.add_argument("json", nargs="?", type=Path, help="annotation file in COCO's layout")
    parser.add_argument("--images", type=Path, metavar="FOLDER", help="folder of its images")
    parser.add_argument(
        "--kind", choices=("instances", "lvis", "captions", "panoptic"), default="instances", help="layout"
    )
    parser.add_argument("--dataset", nargs="+", default=[], metavar="NAME", help="registered datasets")
    parser.add_argument(
        "--config-file", metavar="FILE", help="check DATASETS.TRAIN and DATASETS.TEST of a .yaml file"
    )
    parser.add_argument("--thorough", action="store_true", help="open every image, not some hundreds")
    parser.add_argument("opts", nargs="*", default=[], help="with --config-file: KEY VALUE overrides")
    args = parser.parse_args(argv)
    if args.json is None and not args.dataset and not args.config_file:
        parser.error("name an annotation file, --dataset or --config-file")

    # after the arguments: these take seconds to import
    from clipdense.data.validation import check_dataset, check_image_files, read_coco

    reports = []
    if args.json is not None:
        content, report = read_coco(args.json, args.kind, args.images)
        if args.images is not None:
            records = [{**r, "file_name": str(args.images / r["file_name"])} for r in content["images"]]
            check_image_files(records, report, headers=-1 if args.thorough else 500)
        reports.append(report)
    names = list(args.dataset)
    if args.config_file:
        from clipdense.data.datasets.own import register_from_config
        from clipdense.run.setup import load_config

        cfg = load_config(args.config_file, args.opts)
        register_from_config(cfg)
        names += [*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST]
    for name in dict.fromkeys(names):
        found = check_dataset(name, thorough=args.thorough, use_cache=False)
        if found is None:
            print(f"{name}: no files to check yet (drawn or prepared at its first use)")
        else:
            reports.append(found)
    for report in reports:
        print("\n".join(report.lines()))
    return int(any(report.errors for report in reports))


if __name__ == "__main__":
    with tool_errors():
        sys.exit(main())
