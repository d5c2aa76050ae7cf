#!/usr/bin/env python
"""Run a trained model on your images: a picture of each, and all detections in one JSON file.

    python tools/demo.py --config-file configs/shapes/mask_rcnn_clip_rn.yaml --input photos/ 'more/*.jpg' \\
        --opts MODEL.WEIGHTS output/demo/model_final.pth
    python tools/demo.py --config-file ... --input a.jpg --vocabulary "cat|kitten, red car" --opts ...
    python tools/demo.py --config-file ... --input a.jpg --vocabulary "cat" --background "others" --opts ...
    python tools/demo.py --config-file ... --input a.jpg --score-map "red star" --opts ...
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

A semantic or panoptic open-vocabulary model (OVSeg) assigns every pixel to some class. Give further classes
in --background: pixels and segments of these classes are removed.

Images that fail are listed at the end and make the exit status 1; all others are processed.
"""

from __future__ import annotations

import argparse
import glob
import re
import sys
import time
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any


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
        "--input", nargs="+", default=[], metavar="IMAGES", help="files, folders, or quoted globs"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("output/predictions"), metavar="DIR", help="default: %(default)s"
    )
    parser.add_argument(
        "--score-threshold",
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
    if not arguments.input and not arguments.list_classes:
        parser.error("--input is missing: files, folders, or quoted globs")
    return arguments


if __name__ == "__main__":
    parse_arguments()  # --help and wrong options end here, before the imports that take seconds

import numpy as np
import pycocotools.mask as mask_util
import torch
from PIL import Image

import clipdense
from clipdense.clip.vocabulary import near
from clipdense.data.image import read_image
from clipdense.evaluation.detections import Detections, encode_masks
from clipdense.files import json_text, write_text
from clipdense.run.boundary import tool_errors
from clipdense.run.memory import is_out_of_memory
from clipdense.visualization.pictures import draw_output, draw_score_map, save_picture
from clipdense.visualization.segments import output_kind, output_segments

# Range of the longer side of a picture, in pixels: small images are enlarged, so that names stay legible.
MIN_SIDE, MAX_SIDE = 512, 2048


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    # detectron2 0.6 on current torch versions
    warnings.filterwarnings("ignore", "TypedStorage is deprecated|torch.meshgrid", UserWarning)
    paths, failed = find_images(args.input)
    if not paths and not args.list_classes:
        raise FileNotFoundError("no images: " + "; ".join(f"{name}: {why}" for name, why in failed.items()))
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
    check_classes(args.score_map, predictor)
    results = Results(predictor.metadata, failed)
    start = time.perf_counter()
    try:
        kind = predict(args, predictor, paths, results)
    finally:  # keep the results of an interrupted run
        results.save(args.output / "results.json")
    found = f"{len(results.annotations)} detections"
    if kind not in (None, "instances"):
        found += f", {len(results.segments)} segments"
        if len(classes) == 1 and args.background is None and args.vocabulary:
            print('A single class wins everywhere; --background "others" adds a class for the rest.')
    print(f"{len(results.images)} images, {found}, {time.perf_counter() - start:.1f} seconds: {args.output}")
    for name, why in failed.items():
        print(f"failed: {why if name in why else f'{name}: {why}'}", file=sys.stderr)
    return 1 if failed else 0


def predict(
    args: argparse.Namespace, predictor: clipdense.Predictor, paths: list[Path], results: Results
) -> str | None:
    """Predict on every image, draw the pictures and collect the results; return the kind of output drawn."""
    names, kind = Names(args.output, paths), None
    for path, output in zip(paths, predictor.batch(paths), strict=True):
        if isinstance(output, Exception):
            results.failed[str(path)] = str(output)
            continue
        try:
            kind = show(args, predictor, path, output, names, results)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            results.failed[str(path)] = "not enough memory to draw this image: reduce its size"
    return kind


def show(
    args: argparse.Namespace,
    predictor: clipdense.Predictor,
    path: Path,
    output: dict[str, Any],
    names: Names,
    results: Results,
) -> str:
    """Draw the pictures of one image and add its results; return the kind of output drawn."""
    image = read_image(path, max_pixels=predictor.max_pixels)
    cell = int(np.clip(max(image.shape[:2]), MIN_SIDE, MAX_SIDE))
    picture, kind = names.take(path.stem), output_kind(output, args.show)
    drawn = draw_output(
        image, output, predictor.metadata, score_threshold=0, cell=cell, kind=kind, legend=True
    )
    save_picture(drawn, picture)
    results.add(path, image.shape[:2], picture, output, kind)
    if not args.score_map:
        return kind
    scores, classes = predictor.score_map(image)
    low, high = float(scores.min()), float(scores.max())
    for name in args.score_map:
        file = names.take(f"{path.stem}_{name}")
        draw_score_map(image, scores[classes.index(name)], file, title=name, low=low, high=high, cell=cell)
    return kind


def find_images(inputs: Iterable[str]) -> tuple[list[Path], dict[str, str]]:
    """Return the images of files, folders and globs, and the inputs without images with the reason."""
    readable = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    found: dict[Path, None] = {}
    failed = {}
    for name in inputs:
        path = Path(name).expanduser()
        if path.is_dir():
            files = sorted(path.iterdir())
            matches = [f for f in files if f.suffix.lower() in readable and f.name[0] != "." and f.is_file()]
        elif path.is_file():
            matches = [path]
        else:
            matches = [Path(match) for match in sorted(glob.glob(str(path), recursive=True))]
            matches = [match for match in matches if match.is_file()]
        if not matches:
            failed[name] = "a folder without images" if path.is_dir() else "there is no such file"
        found.update(dict.fromkeys(matches))
    return list(found), failed


def check_classes(names: Sequence[str], predictor: clipdense.Predictor) -> None:
    """Raise ValueError if the model has no score maps, or none of a class."""
    for name in names:
        known = predictor.score_classes
        if name not in known:
            hint = near(name, known) or known[:10]
            raise ValueError(
                f"--score-map: {name!r} is not a class of this model; similar: {', '.join(hint)}"
            )


class Names:
    """Names of new files in a folder, different from each other and from the input images."""

    def __init__(self, folder: Path, images: Iterable[Path]) -> None:
        self._folder = folder
        own = folder.resolve()
        self._used = {image.name.lower() for image in images if image.resolve().parent == own}

    def take(self, stem: str) -> Path:
        """Return a new file named after ``stem``, with a number if the name is in use."""
        stem = re.sub(r'[\s/\\:*?"<>|]+', "_", stem)
        number, name = 1, f"{stem}.jpg"
        while name.lower() in self._used:
            number += 1
            name = f"{stem}_{number}.jpg"
        self._used.add(name.lower())
        return self._folder / name


class Results:
    """Content of ``results.json``."""

    def __init__(self, metadata: Any, failed: dict[str, str]) -> None:
        self._metadata, self.failed = metadata, failed
        self._classes = metadata.get("thing_classes") or metadata.get("stuff_classes") or ()
        self.images: list[dict[str, Any]] = []
        self.annotations: list[dict[str, Any]] = []
        self.segments: list[dict[str, Any]] = []

    def add(
        self, path: Path, size: tuple[int, int], picture: Path, output: dict[str, Any], kind: str
    ) -> None:
        """Add an image of a size (height, width), its detections and its drawn output, a key of `KINDS`."""
        number = len(self.images)
        entry = {"id": number, "file_name": str(path), "height": size[0], "width": size[1]}
        self.images.append(entry | {"picture": picture.name})
        if kind != "instances":
            names = self._metadata.get("stuff_classes") or ()
            for segment in output_segments(output, kind, self._metadata):
                (mask,) = encode_masks(torch.from_numpy(segment.pop("mask"))[None])
                c = segment["category_id"]
                row = {"id": len(self.segments), "image_id": number, **segment, "segmentation": mask}
                row |= {"bbox": mask_util.toBbox(mask).tolist(), "area": int(mask_util.area(mask))}
                self.segments.append(row | {"category": names[c] if c < len(names) else str(c)})
        if "instances" not in output:
            return
        for row in Detections.from_instances(output["instances"], number).to_json():
            c = row["category_id"]
            name = self._classes[c] if c < len(self._classes) else str(c)
            self.annotations.append({"id": len(self.annotations), **row, "category": name, "iscrowd": 0})

    def save(self, path: Path) -> None:
        """Write the file whole, or leave the one that is there."""
        content = {
            "images": self.images,
            "categories": [{"id": i, "name": name} for i, name in enumerate(self._classes)],
            "annotations": self.annotations,
            "segments": self.segments,
            "failed": [{"file_name": name, "reason": why} for name, why in self.failed.items()],
        }
        write_text(path, json_text(content, indent=1) + "\n")


if __name__ == "__main__":
    with tool_errors("interrupted; results so far are kept"):
        sys.exit(main())
