#!/usr/bin/env python
"""Draw the k-means clusters of dense features, several models side by side.

    tools/dense_clusters.py clusters.png --model shapes-vit output/clipself/export.safetensors
    tools/dense_clusters.py clusters.png --model shapes-rn shapes-vit --input a.jpg b.jpg --image-size 512

Each image and model is clustered separately: compare the borders of the clusters; colours have no meaning.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=Path, help="PNG to write")
    parser.add_argument(
        "--model",
        nargs="+",
        required=True,
        help="model names or weight files, as for load_clip; one column each",
    )
    parser.add_argument("--allow-pickle", action="store_true", help="allow weight files that are pickles")
    parser.add_argument("--titles", nargs="+", help="titles of the columns (default: the models)")
    parser.add_argument("--input", nargs="+", type=Path, help="image files (default: images of --dataset)")
    parser.add_argument(
        "--dataset", default="shapes_closed_panoptic_val", help="registered dataset (default: %(default)s)"
    )
    parser.add_argument(
        "--images", type=int, default=6, help="number of images of --dataset, the first ones (default: 6)"
    )
    parser.add_argument("--clusters", type=int, default=6, help="number of clusters in an image (default: 6)")
    parser.add_argument(
        "--mode",
        default="",
        help="dense mode (default: clipself, value or plain, the first that the tower has)",
    )
    parser.add_argument(
        "--image-size",
        type=int,
        default=0,
        help="side in pixels of letterboxed images, a multiple of the stride (default: the image's own)",
    )
    parser.add_argument("--device", default="cuda", help="cuda (default if there is a GPU), cpu, ...")
    arguments = parser.parse_args(argv)
    arguments.titles = arguments.titles or arguments.model
    if len(arguments.titles) != len(arguments.model):
        parser.error("--titles: expected one for each --model")
    if len(set(arguments.titles)) < len(arguments.titles):
        parser.error("--titles: titles must differ")
    return arguments


if __name__ == "__main__":
    parse_arguments()  # --help and wrong options end here, before the imports that take seconds

import torch
from tqdm import tqdm

import clipdense  # noqa: F401
from clipdense.clip import load_clip
from clipdense.data.checks import check_named_datasets
from clipdense.data.image import read_image
from clipdense.evaluation import CLIPProbe
from clipdense.run.boundary import tool_errors
from clipdense.run.setup import available_device
from clipdense.visualization.clusters import cluster_map, draw_clusters

from detectron2.data import DatasetCatalog


@torch.inference_mode()
def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    files = arguments.input
    if not files:
        check_named_datasets([arguments.dataset])
        files = [r["file_name"] for r in DatasetCatalog.get(arguments.dataset)[: arguments.images]]
    images = [read_image(file, "RGB") for file in files]
    maps = {}
    for title, name in zip(arguments.titles, arguments.model, strict=True):
        clip = load_clip(name, allow_pickle=arguments.allow_pickle, text=False)
        clip.to(available_device(arguments.device))
        probe = CLIPProbe(clip)
        maps[title] = [
            cluster_map(
                probe.dense_map(image, arguments.mode, arguments.image_size),
                image.shape[:2],
                arguments.clusters,
            )
            for image in tqdm(images, title, unit="image")
        ]
    draw_clusters(images, maps, arguments.output)
    print(arguments.output)
    return 0


if __name__ == "__main__":
    with tool_errors():
        sys.exit(main())
