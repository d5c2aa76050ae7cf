#!/usr/bin/env python
"""Run a trained model on your images: a picture of each, and all detections in one JSON file.

    python tools/demo.py --config-file configs/shapes/mask_rcnn_clip_rn.yaml --input photos/ 'more/*.jpg' \\
        --opts MODEL.WEIGHTS output/demo/model_final.pth
    python tools/demo.py --config-file ... --input a.jpg --vocabulary "cat|kitten, red car" --opts ...
    python tools/demo.py --config-file ... --input a.jpg --score-map "red star" --opts ...

Into the output folder come:
    <image>.jpg           detections (or the panoptic or semantic map) drawn on the image
    <image>_<class>.jpg   with --score-map: where the backbone sees that class, and its lowest and highest
                          score; blue to red spans the scores of all classes in this image
    results.json          "images", "categories" and "annotations" as in a COCO file: "bbox" is x, y, width,
                          height in pixels of the upright image, "segmentation" a run-length encoded mask,
                          with "score" and "category" (the class name); "failed": images that cannot be read

Images that cannot be read are listed at the end, and the exit status is 1; the others are done all the same.
"""

from __future__ import annotations

import argparse
import glob
import json
import re
import sys
import time
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import clipdense
from clipdense.checkpoint import CheckpointError, atomic_path
from clipdense.clip.vocabulary import near
from clipdense.data.image import read_image
from clipdense.engine.options import ConfigError
from clipdense.evaluation.detections import Detections
from clipdense.visualize import draw_output, draw_score_map, save_picture

# Longer side of a picture, in pixels: names stay legible on small images, large ones are reduced.
SMALLEST, LARGEST = 512, 2048


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--config-file", required=True, metavar="FILE", help="the model's config (.yaml, .py)"
    )
    parser.add_argument(
        "--input", required=True, nargs="+", metavar="IMAGES", help="files, folders, or quoted globs"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("output/predictions"), metavar="DIR", help="default: %(default)s"
    )
    parser.add_argument(
        "--score-threshold",
        type=float,
        default=0.5,
        metavar="SCORE",
        help="leave out detections below it, 0 to 1 (default: %(default)s)",
    )
    parser.add_argument(
        "--vocabulary",
        metavar="WORDS",
        help='what to look for, instead of the test set\'s classes: words ("cat|kitten, red car"; bars part '
        "synonyms) or a class-list file (.txt, .json); open-vocabulary models only",
    )
    parser.add_argument(
        "--score-map",
        nargs="+",
        default=[],
        metavar="CLASS",
        help="also draw these classes' score maps (models with a language backbone, such as DenseCLIP)",
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
        parser.error(f"--score-threshold must lie in 0 to 1, not {arguments.score_threshold}")
    return arguments


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    # detectron2 0.6 on today's torch
    warnings.filterwarnings("ignore", "TypedStorage is deprecated|torch.meshgrid", UserWarning)
    paths, failed = find_images(args.input)
    if not paths:
        raise FileNotFoundError("no images: " + "; ".join(f"{name}: {why}" for name, why in failed.items()))
    args.output.mkdir(parents=True, exist_ok=True)
    predictor = clipdense.Predictor(
        args.config_file,
        opts=args.opts,
        score_threshold=args.score_threshold,
        vocabulary=args.vocabulary,
    )
    check_classes(args.score_map, predictor)
    results = Results(predictor.metadata.get("thing_classes") or (), failed)
    names = Names(args.output, paths)
    start = time.perf_counter()
    try:
        for path, output in zip(paths, predictor.batch(paths), strict=True):
            if isinstance(output, Exception):
                failed[str(path)] = str(output)
                continue
            image = read_image(path)
            cell = int(np.clip(max(image.shape[:2]), SMALLEST, LARGEST))
            picture = names.take(path.stem)
            save_picture(
                draw_output(image, output, predictor.metadata, score_threshold=0, cell=cell), picture
            )
            results.add(path, image.shape[:2], picture, output)
            if args.score_map:
                scores, classes = predictor.score_map(image)
                for name in args.score_map:
                    draw_score_map(
                        image,
                        scores[classes.index(name)],
                        names.take(f"{path.stem}_{name}"),
                        title=name,
                        low=float(scores.min()),
                        high=float(scores.max()),
                        cell=cell,
                    )
    finally:  # what is done is kept, also when it is interrupted
        results.save(args.output / "results.json")
    print(
        f"{len(results.images)} images, {len(results.annotations)} detections, "
        f"{time.perf_counter() - start:.1f} seconds: {args.output}"
    )
    for name, why in failed.items():
        print(f"failed: {why if name in why else f'{name}: {why}'}", file=sys.stderr)
    return 1 if failed else 0


def find_images(inputs: Iterable[str]) -> tuple[list[Path], dict[str, str]]:
    """The images that files, folders and globs name, each once; and what names none, with the reason."""
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


def check_classes(wanted: Sequence[str], predictor: clipdense.Predictor) -> None:
    """Raise ValueError for a model without score maps, or a class that it does not score."""
    for name in wanted:
        known = predictor.score_classes
        if name not in known:
            hint = near(name, known) or known[:10]
            raise ValueError(f"--score-map: {name!r} is no class of this model; near it: {', '.join(hint)}")


class Names:
    """Pictures' files in a folder: no two the same, and none of the images that are read."""

    def __init__(self, folder: Path, images: Iterable[Path]) -> None:
        self._folder = folder
        own = folder.resolve()
        self._taken = {image.name.lower() for image in images if image.resolve().parent == own}

    def take(self, stem: str) -> Path:
        """A new file, called ``stem`` or nearly so."""
        stem = re.sub(r'[\s/\\:*?"<>|]+', "_", stem)
        number, name = 1, f"{stem}.jpg"
        while name.lower() in self._taken:
            number += 1
            name = f"{stem}_{number}.jpg"
        self._taken.add(name.lower())
        return self._folder / name


class Results:
    """What ``results.json`` holds."""

    def __init__(self, classes: Sequence[str], failed: dict[str, str]) -> None:
        self._classes, self._failed = classes, failed
        self.images: list[dict[str, Any]] = []
        self.annotations: list[dict[str, Any]] = []

    def add(self, path: Path, size: tuple[int, int], picture: Path, output: dict[str, Any]) -> None:
        """Add an image of a size (height, width) and its detections."""
        number = len(self.images)
        entry = {"id": number, "file_name": str(path), "height": size[0], "width": size[1]}
        self.images.append(entry | {"picture": picture.name})
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
            "failed": [{"file_name": name, "reason": why} for name, why in self._failed.items()],
        }
        with atomic_path(path) as part:
            part.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (CheckpointError, ConfigError, OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted: what was done is kept")
