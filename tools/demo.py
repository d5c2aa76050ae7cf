#!/usr/bin/env python
"""Run a trained model on your images: a picture of each, and all detections in one JSON file.

    python tools/demo.py --config-file configs/shapes/mask_rcnn_clip_rn.yaml --input photos/ 'more/*.jpg' \\
        --opts MODEL.WEIGHTS output/demo/model_final.pth
    python tools/demo.py --config-file ... --input a.jpg --vocabulary "cat|kitten, red car" --opts ...
    python tools/demo.py --config-file ... --input a.jpg --vocabulary "cat" --background "others" --opts ...
    python tools/demo.py --config-file ... --input a.jpg --score-map "red star" --opts ...
    python tools/demo.py --config-file ... --list-classes --opts ...

Into the output folder come:
    <image>.jpg           detections (or the panoptic or semantic map, see --show) drawn on the image, and
                          below it what is in it; what has no class is left clear
    <image>_<class>.jpg   with --score-map: where the backbone sees that class, and its lowest and highest
                          score; blue to red spans the scores of all classes in this image
    results.json          "images", "categories" and "annotations" as in a COCO file: "bbox" is x, y, width,
                          height in pixels of the upright image, "segmentation" a run-length encoded mask,
                          with "score" and "category" (the class name); "segments" likewise, without "score":
                          the parts of the map that is drawn; "failed": images that cannot be read

A model that compares words (OVSeg) calls everything the word that fits best. Words for what is not looked for
belong into --background: what fits them best is left out.

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
import pycocotools.mask as mask_util
import torch
from PIL import Image

import clipdense
from clipdense.checkpoint import CheckpointError
from clipdense.clip.vocabulary import near
from clipdense.data.image import read_image
from clipdense.engine.options import ConfigError
from clipdense.evaluation.detections import Detections, encode_masks
from clipdense.files import write_text
from clipdense.visualization.pictures import draw_output, draw_score_map, save_picture
from clipdense.visualization.segments import KINDS, output_kind, output_segments

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
        help="leave out detections below it, 0 to 1 (default: %(default)s)",
    )
    parser.add_argument(
        "--vocabulary",
        metavar="WORDS",
        help='what to look for, instead of the test set\'s classes: words ("cat|kitten, red car"; bars part '
        "synonyms) or a class-list file (.txt, .json); open-vocabulary models only",
    )
    parser.add_argument(
        "--background",
        metavar="WORDS",
        help='words for anything else ("others, wall|floor"); what fits them best is left out',
    )
    parser.add_argument(
        "--show",
        choices=list(KINDS),
        help="what is drawn and listed, of a model that can give several (default: the first of them that it "
        "gives)",
    )
    parser.add_argument(
        "--list-classes", action="store_true", help="print what the model looks for, and end there"
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
    if not arguments.input and not arguments.list_classes:
        parser.error("--input is missing: files, folders, or quoted globs")
    return arguments


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    # detectron2 0.6 on today's torch
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
    kind = None
    names = Names(args.output, paths)
    start = time.perf_counter()
    try:
        for path, output in zip(paths, predictor.batch(paths), strict=True):
            if isinstance(output, Exception):
                failed[str(path)] = str(output)
                continue
            image = read_image(path)
            cell = int(np.clip(max(image.shape[:2]), SMALLEST, LARGEST))
            picture, kind = names.take(path.stem), output_kind(output, args.show)
            drawn = draw_output(
                image, output, predictor.metadata, score_threshold=0, cell=cell, kind=kind, legend=True
            )
            save_picture(drawn, picture)
            results.add(path, image.shape[:2], picture, output, kind)
            if args.score_map:
                scores, scored = predictor.score_map(image)
                for name in args.score_map:
                    draw_score_map(
                        image,
                        scores[scored.index(name)],
                        names.take(f"{path.stem}_{name}"),
                        title=name,
                        low=float(scores.min()),
                        high=float(scores.max()),
                        cell=cell,
                    )
    finally:  # what is done is kept, also when it is interrupted
        results.save(args.output / "results.json")
    found = f"{len(results.annotations)} detections"
    if kind not in (None, "instances"):
        found += f", {len(results.segments)} segments"
        if len(classes) == 1 and args.background is None and args.vocabulary:
            print('One word alone fits everything best: --background "others" gives the rest a name.')
    print(f"{len(results.images)} images, {found}, {time.perf_counter() - start:.1f} seconds: {args.output}")
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

    def __init__(self, metadata: Any, failed: dict[str, str]) -> None:
        self._metadata, self._failed = metadata, failed
        self._classes = metadata.get("thing_classes") or metadata.get("stuff_classes") or ()
        self.images: list[dict[str, Any]] = []
        self.annotations: list[dict[str, Any]] = []
        self.segments: list[dict[str, Any]] = []

    def add(
        self, path: Path, size: tuple[int, int], picture: Path, output: dict[str, Any], kind: str
    ) -> None:
        """Add an image of a size (height, width), its detections, and what is drawn, a key of `KINDS`."""
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
            "failed": [{"file_name": name, "reason": why} for name, why in self._failed.items()],
        }
        write_text(path, json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (CheckpointError, ConfigError, OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted: what was done is kept")
