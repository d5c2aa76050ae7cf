#!/usr/bin/env python
"""Run a trained model on your images: a picture of each, and all detections in one JSON file.

    python tools/demo.py --config-file configs/shapes/mask_rcnn_clip_rn.yaml \\
        --input projects/ShapesWorld/scenes --opts MODEL.WEIGHTS output/demo/model_final.pth
    python tools/demo.py --config-file ... --input a.jpg --vocabulary "cat|kitten, red car" --opts ...
    python tools/demo.py --config-file ... --input a.jpg --vocabulary "cat" --background "others" --opts ...
    python tools/demo.py --config-file ... --input a.jpg --score-map "red star" --opts ...
    python tools/demo.py --config-file ... --video-input a.mp4 --confidence-threshold 0.6 --opts ...
    python tools/demo.py --config-file ... --list-classes --opts ...

Files in the output folder:
    <image>.jpg           detections (or the panoptic or semantic map, see --show) drawn on the image, with a
                          list of the classes below it; pixels without a class stay clear
    <image>_<class>.jpg   with --score-map: the backbone's scores of that class and their range; the colours,
                          blue to red, span the scores of all classes in this image
    results.json          "images", "categories" and "annotations" as in a COCO file: "bbox" is x, y, width,
                          height in pixels of the upright image, "segmentation" a run-length encoded mask,
                          with "score" and "category" (the class name); "segments": the same for the
                          segments of the drawn map, without "score"; "failed": images that cannot be
                          read or do not fit into memory, with the reason
    <video>.mp4           the frames of a video or camera with what was found, at its rate
    <video>.jsonl         a line for each frame: "frame", "time" in seconds, "objects" as the rows above

Files of an earlier run in the same folder are moved to its subfolder old_1, old_2, ...

A semantic or panoptic open-vocabulary model (OVSeg) assigns every pixel to some class. Give further classes
in --background: pixels and segments of these classes are removed.

Images that fail are listed at the end and make the exit status 1; all others are processed.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--config-file",
        required=True,
        metavar="FILE",
        help="config of the model: .yaml, or .py, which is run as a program",
    )
    parser.add_argument(
        "--input",
        nargs="+",
        default=[],
        metavar="IMAGES",
        help="files, folders, quoted globs, or videos",
    )
    parser.add_argument(
        "--recursive", action="store_true", help="also read the subfolders of the folders in --input"
    )
    parser.add_argument(
        "--video-input", nargs="+", default=[], metavar="VIDEOS", help="video files, as --input takes them"
    )
    parser.add_argument(
        "--webcam",
        nargs="?",
        const=0,
        type=int,
        metavar="NUMBER",
        help="read a camera until Ctrl-C (default number: 0)",
    )
    parser.add_argument(
        "--output", type=Path, default=Path("output/predictions"), metavar="DIR", help="default: %(default)s"
    )
    parser.add_argument(
        "--score-threshold",
        "--confidence-threshold",
        type=float,
        default=0.5,
        metavar="SCORE",
        help="remove detections with a lower score, 0 to 1 (default: %(default)s)",
    )
    parser.add_argument(
        "--vocabulary",
        metavar="WORDS",
        help='classes to predict instead of those of the test dataset: names ("cat|kitten, red car"; bars '
        "separate synonyms) or a class-list file (.txt, .json); open-vocabulary models only",
    )
    parser.add_argument(
        "--background",
        metavar="WORDS",
        help='background classes ("others, wall|floor"), which are removed from the output',
    )
    parser.add_argument(
        "--show",
        choices=["panoptic", "instances", "semantic"],
        help="the only output to compute, draw and list (default: all that are configured; the first of "
        "these is drawn)",
    )
    parser.add_argument("--list-classes", action="store_true", help="print the model's classes and exit")
    parser.add_argument(
        "--score-map",
        nargs="+",
        default=[],
        metavar="CLASS",
        help="also draw the score maps of these classes (models with a language backbone, such as DenseCLIP)",
    )
    parser.add_argument(
        "--opts",
        nargs=argparse.REMAINDER,
        default=[],
        metavar="KEY VALUE",
        help="config overrides, e.g. MODEL.WEIGHTS model.pth MODEL.DEVICE cpu; the last option",
    )
    arguments = parser.parse_args(argv)
    if not 0 <= arguments.score_threshold <= 1:
        parser.error(f"--score-threshold must be in 0..1, got {arguments.score_threshold}")
    if not (
        arguments.input or arguments.video_input or arguments.webcam is not None or arguments.list_classes
    ):
        parser.error("--input is missing: files, folders, or quoted globs")
    return arguments


if __name__ == "__main__":
    parse_arguments()  # --help and wrong options end here, before the imports that take seconds

import clipdense
from clipdense.run.boundary import tool_errors
from clipdense.run.inputs import find_inputs
from clipdense.run.outputs import OutputFolder
from clipdense.run.predicting import PredictionSettings, check_score_classes, predict_inputs


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    # detectron2 0.6 on current torch versions
    warnings.filterwarnings("ignore", "TypedStorage is deprecated|torch.meshgrid", UserWarning)
    cameras = [f"camera:{args.webcam}"] if args.webcam is not None else []
    inputs = find_inputs([*args.input, *args.video_input, *cameras], recursive=args.recursive)
    if not inputs and not args.list_classes:
        reasons = "; ".join(f"{name}: {why}" for name, why in inputs.failed.items())
        raise FileNotFoundError(f"no images: {reasons}")
    if not args.list_classes:
        args.output.mkdir(parents=True, exist_ok=True)
    predictor = clipdense.Predictor(
        args.config_file,
        opts=args.opts,
        score_threshold=args.score_threshold,
        vocabulary=args.vocabulary,
        background=args.background,
        output=args.show,
    )
    classes = predictor.metadata.get("stuff_classes") or predictor.metadata.get("thing_classes") or ()
    if args.list_classes:
        print("\n".join(classes))
        return 0
    check_score_classes(args.score_map, predictor)
    outputs = OutputFolder(args.output, predictor.metadata, inputs=inputs.images)
    settings = PredictionSettings(args.show or "", score_maps=tuple(args.score_map))
    status = predict_inputs(predictor, inputs, outputs, settings)
    if outputs.num_segments and len(classes) == 1 and args.background is None and args.vocabulary:
        print('A single class wins everywhere; --background "others" adds a class for the rest.')
    return status


if __name__ == "__main__":
    with tool_errors("interrupted; results so far are kept"):
        sys.exit(main())
