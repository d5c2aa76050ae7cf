#!/usr/bin/env python
"""Draw the pixel features and class embeddings of a language backbone in one plane, by t-SNE.

    tools/draw_neighbours.py neighbours.png --config-file configs/shapes/denseclip_semantic_fpn_rn.yaml \\
        --weights output/shapes/denseclip_semantic_fpn_rn/model_final.pth

Dots are pixels, stars are class names; one colour a class. The classes that cover most pixels are drawn.
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
    parser.add_argument("--config-file", required=True, help="config of a model on a LanguageTrunk")
    parser.add_argument("--weights", default="", help="weight file (default: the config's)")
    parser.add_argument(
        "--dataset",
        default="",
        help="registered dataset with semantic maps (default: the first of DATASETS.TEST)",
    )
    parser.add_argument(
        "--images", type=int, default=20, help="number of images, the first ones (default: 20)"
    )
    parser.add_argument("--classes", type=int, default=10, help="number of classes (default: 10)")
    parser.add_argument(
        "--pixels", type=int, default=20, help="largest number of pixels of a class in an image (default: 20)"
    )
    parser.add_argument("--opts", nargs=argparse.REMAINDER, default=[], help="KEY VALUE pairs of the config")
    return parser.parse_args(argv)


if __name__ == "__main__":
    parse_arguments()  # --help and wrong options end here, before the imports that take seconds

import numpy as np
import torch
from tqdm import tqdm

from clipdense.backbone.score_map import joint_features, score_classes
from clipdense.data.checks import check_named_datasets
from clipdense.data.image import read_image, read_labels
from clipdense.data.mappers import build_mapper, map_image
from clipdense.run.boundary import tool_errors
from clipdense.run.predictor import Predictor
from clipdense.visualization.neighbours import draw_neighbours, neighbour_positions, sample_pixels

from detectron2.data import DatasetCatalog


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    predictor = Predictor(arguments.config_file, arguments.weights or None, arguments.opts)
    model, cfg = predictor.model, predictor.cfg
    names = score_classes(model)
    dataset = arguments.dataset or cfg.DATASETS.TEST[0]
    check_named_datasets([dataset])
    mapper = build_mapper(cfg, False)
    pixels, labels, texts = [], [], []
    for record in tqdm(DatasetCatalog.get(dataset)[: arguments.images], unit="image"):
        if "sem_seg_file_name" not in record:
            raise ValueError(f"--dataset: {dataset} has no semantic maps; name a dataset that has them")
        sample = map_image(mapper, read_image(record["file_name"], cfg.INPUT.FORMAT))
        features, text = joint_features(model, sample)
        truth = torch.from_numpy(read_labels(record["sem_seg_file_name"]))
        found = sample_pixels(features, truth, arguments.pixels)
        pixels.append(found[0])
        labels.append(found[1])
        texts.append(text.float().cpu().numpy())
    everything, classes = np.concatenate(pixels), np.concatenate(labels)
    kept = classes < len(names)
    largest = np.argsort(-np.bincount(classes[kept], minlength=len(names)))[: arguments.classes]
    position = np.full(len(names), -1)
    position[largest] = np.arange(len(largest))
    kept &= position[np.where(kept, classes, 0)] >= 0
    dots, stars = neighbour_positions(everything[kept], np.mean(texts, axis=0)[largest])
    draw_neighbours(dots, position[classes[kept]], stars, [names[i] for i in largest], arguments.output)
    print(arguments.output)
    return 0


if __name__ == "__main__":
    with tool_errors():
        sys.exit(main())
