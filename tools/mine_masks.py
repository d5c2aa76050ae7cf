#!/usr/bin/env python
"""Mine mask-noun pairs from captioned images, to adapt CLIP to masked crops (OVSeg, section 3.2).

    tools/mine_masks.py --config-file configs/shapes/ovseg.yaml --data shapes_clip_train --captions 5
        --output output/mined --jobs 2 MODEL.WEIGHTS output/shapes/ovseg/model_final.pth
    tools/mine_masks.py --config-file ... --data coco_2017_train_captions --output /shared/mined --ray auto
        MODEL.WEIGHTS ...
    tools/mine_masks.py --config-file ... --data coco_2017_val_captions --proposals ground_truth:coco_2017_val
        --truth coco_2017_val --output ...

CLIP embeds the masked crop of every proposal, and the nouns of the image's captions. Every noun is paired
with the proposal of highest cosine similarity. Files in the output folder:
    pairs.jsonl   one pair a line (or pairs.parquet): file_name, height, width, segmentation (COCO RLE), noun,
                  score (cosine), image_id, caption; for DATASETS.MASK_PAIRS
    stats.json    statistics of the run, which are also printed
    sheet.png     a sample of the pairs
    errors.jsonl  images that cannot be used, each with its reason; they make the exit status 1
    parts/        finished parts; the same command resumes an interrupted run from them

With --ray, the parts are computed on a Ray cluster whose machines share the output folder and the images.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", required=True, metavar="FILE", help="config of an OVSeg model")
    parser.add_argument(
        "--data",
        required=True,
        help="captioned images: a registered dataset, COCO captions (.json), or a .jsonl with file_name and "
        "captions",
    )
    parser.add_argument(
        "--image-root", default="", help="folder of a file's images (default: the folder of the file)"
    )
    parser.add_argument(
        "--captions",
        type=int,
        default=1,
        metavar="N",
        help="captions of each image, the first N (default: 1)",
    )
    parser.add_argument("--images", type=int, metavar="N", help="only the first N images")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument(
        "--proposals",
        default="model",
        help="model (default): those of the config, which needs MODEL.WEIGHTS; ground_truth:DATASET: "
        "annotated segments; or a .json list of image_id and segmentation (COCO RLE)",
    )
    parser.add_argument(
        "--heads", action="store_true", help="nouns without modifiers: car instead of red car"
    )
    parser.add_argument("--lemma", action="store_true", help="nouns in the singular")
    parser.add_argument(
        "--min-area",
        type=int,
        default=0,
        metavar="PIXELS",
        help="drop smaller proposals (default: 0)",
    )
    parser.add_argument(
        "--min-score", type=float, default=-1.0, help="drop pairs of lower cosine similarity (default: -1)"
    )
    parser.add_argument(
        "--margin",
        type=float,
        default=0.0,
        help="drop pairs whose cosine exceeds that of the second-best proposal by less (default: 0)",
    )
    parser.add_argument(
        "--jobs", type=int, default=1, metavar="N", help="processes on this machine (default: 1)"
    )
    parser.add_argument(
        "--ray",
        default="",
        metavar="ADDRESS|auto",
        help="compute on a Ray cluster: HOST:PORT of its head, auto (the cluster of this machine), or local",
    )
    parser.add_argument(
        "--actors",
        type=int,
        default=0,
        metavar="N",
        help="largest number of models on the cluster (default: one for each GPU, or CPU but one)",
    )
    parser.add_argument(
        "--part-size", type=int, default=64, metavar="IMAGES", help="images in a part (default: 64)"
    )
    parser.add_argument(
        "--retry-failed", action="store_true", help="try the images of errors.jsonl again, with their parts"
    )
    parser.add_argument(
        "--format", choices=["jsonl", "parquet"], default="jsonl", help="format of the pair file"
    )
    parser.add_argument(
        "--truth",
        metavar="DATASET",
        help="dataset whose segments are compared with the masks of nouns that are class names (default: the "
        "data, if they have classes)",
    )
    parser.add_argument(
        "opts", nargs="*", metavar="KEY VALUE", help="config overrides, e.g. MODEL.WEIGHTS FILE"
    )
    arguments = parser.parse_args(argv)
    for name in ("captions", "jobs", "part_size"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    return arguments


if __name__ == "__main__":
    parse_arguments()  # --help and wrong options end here, before the imports that take seconds

import clipdense  # noqa: F401
from clipdense.run.boundary import tool_errors
from clipdense.run.execution import Execution
from clipdense.run.mining import MiningJob, mine
from clipdense.systems.mining.pairs import Filters


def main(argv: Sequence[str] | None = None) -> int:
    arguments = vars(parse_arguments(argv))
    # detectron2 0.6 on today's torch
    warnings.filterwarnings("ignore", "TypedStorage is deprecated|torch.meshgrid", UserWarning)
    names = ("jobs", "ray", "actors", "part_size", "retry_failed")
    execution = Execution(**{name: arguments.pop(name) for name in names})
    filters = Filters(*(arguments.pop(name) for name in ("min_area", "min_score", "margin")))
    return mine(MiningJob(**arguments, filters=filters, execution=execution))


if __name__ == "__main__":
    with tool_errors("interrupted; finished parts are kept, and the same command continues"):
        sys.exit(main())
