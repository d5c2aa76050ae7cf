"""Make splits of the embedded `shapes` world on disk, and look at them.

    python tools/make_shapes.py --split train val
    python tools/make_shapes.py --split val --images 48 --root output/shapes --sheet output/sheet.png

An interrupted run resumes. This tool is optional: each dataset is drawn at its first use.
"""

import argparse
import logging
import time
from pathlib import Path

from clipdense.data.shapes.make import ensure_shapes, shapes_root
from clipdense.data.shapes.splits import SPLITS


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    sizes = ", ".join(f"{name} {split.images}" for name, split in SPLITS.items())
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=f"Splits and their images: {sizes}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--split", nargs="+", required=True, choices=[*SPLITS, "all"], metavar="SPLIT")
    parser.add_argument("--images", type=int, metavar="N", help="the first N images (default: all)")
    parser.add_argument("--root", type=Path, default=shapes_root(), help="folder (default: %(default)s)")
    parser.add_argument(
        "--workers", type=int, metavar="N", help="processes (default: usable cores, at most 8)"
    )
    parser.add_argument(
        "--sheet", type=Path, metavar="FILE", help="draw a contact sheet with annotations, PNG"
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    parse_arguments()  # --help and wrong options end here, before the imports that take seconds

from clipdense.data.shapes.sheet import draw_sheet
from clipdense.run.boundary import tool_errors


def main() -> None:
    options = parse_arguments()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    splits = list(SPLITS) if "all" in options.split else options.split
    for split in splits:
        start = time.perf_counter()
        ensure_shapes(split, options.images, options.root, workers=options.workers)
        print(f"shapes {split}: ready in {options.root} after {time.perf_counter() - start:.1f} s")
        if options.sheet:
            several = len(splits) > 1
            path = options.sheet.with_stem(f"{options.sheet.stem}_{split}") if several else options.sheet
            draw_sheet(options.root, split, path, images=options.images)
            print(f"contact sheet: {path}")


if __name__ == "__main__":
    with tool_errors("interrupted; the same command continues"):
        main()
