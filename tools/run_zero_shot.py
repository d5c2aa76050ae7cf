#!/usr/bin/env python
"""Compare training-free segmentation methods: a table over methods, datasets and CLIPs, no training.

    python tools/run_zero_shot.py --towers shapes-vit shapes-eva --methods clip maskclip sclip naclip \\
        --config-file configs/shapes/Base-ZeroShot.yaml --images 100
    python tools/run_zero_shot.py --towers ViT-B-16-quickgelu:openai --methods sclip naclip proxyclip \\
        --benchmarks voc21 context59 --opts MODEL.DEVICE cuda

With --benchmarks, every method has its published settings (short side, windows, thresholds, class names);
without it, all methods have those of the config. Methods with the same windows share one forward of CLIP for
each image.

Files in the output folder: results.json, a list of rows with metrics; table.md.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--config-file",
        default="projects/ZeroShot/configs/Base-ZeroShot.yaml",
        metavar="FILE",
        help="config of a ZeroShotSegmentor (default: %(default)s)",
    )
    parser.add_argument(
        "--towers",
        nargs="+",
        required=True,
        metavar="NAME[:WEIGHTS]",
        help="open_clip models with a tag or weight file, such as ViT-B-16-quickgelu:openai, or nano CLIPs",
    )
    parser.add_argument("--methods", nargs="+", required=True, metavar="METHOD")
    parser.add_argument(
        "--benchmarks",
        nargs="+",
        default=[],
        metavar="NAME",
        help="voc21, voc20, context60, context59, coco_object, coco_stuff, cityscapes, ade20k (default: the "
        "datasets of the config)",
    )
    parser.add_argument(
        "--images", type=int, default=0, metavar="N", help="use the first N images only (default: all)"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("output/zero_shot"), metavar="DIR", help="default: %(default)s"
    )
    parser.add_argument(
        "--opts", nargs=argparse.REMAINDER, default=[], metavar="KEY VALUE", help="config overrides"
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    parse_arguments()  # --help and wrong options end here, before the imports that take seconds

import torch
from tabulate import tabulate
from tqdm import tqdm

import clipdense  # noqa: F401
from clipdense.clip import ClipModel, load_clip
from clipdense.data.classes import dataset_vocabulary
from clipdense.data.loader import build_test_loader
from clipdense.evaluation.build import build_evaluator
from clipdense.files import json_text, write_text
from clipdense.run.boundary import tool_errors
from clipdense.run.setup import available_device, load_config
from clipdense.systems.training_free import Memo, ZeroShotSegmentor, protocol_overrides

Row = dict[str, Any]
METRICS = ("mIoU", "mIoU_base", "mIoU_novel", "pACC")


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    rows: list[Row] = []
    for tower in args.towers:
        name, _, weights = tower.partition(":")
        clip = load_clip(name, weights or None)
        for benchmark in args.benchmarks or [""]:
            for row in evaluate(args, clip, tower, benchmark):
                rows.append(row)
                write_text(args.output / "results.json", json_text(rows, indent=1) + "\n")
    table = markdown(rows)
    write_text(args.output / "table.md", table + "\n")
    print(table)
    return 0


def evaluate(args: argparse.Namespace, clip: ClipModel, tower: str, benchmark: str) -> Iterator[Row]:
    """Evaluate all methods on the datasets of one benchmark; methods with equal windows share forwards."""
    configs = {method: _config(args, method, benchmark, tower) for method in args.methods}
    device = available_device(next(iter(configs.values())).MODEL.DEVICE)
    clip.to(device)
    memo = Memo()
    models = {method: _model(cfg, clip, memo).to(device) for method, cfg in configs.items()}
    datasets = next(iter(configs.values())).DATASETS.TEST
    for dataset in datasets:
        folder = args.output / "inference" / re.sub(r"[^\w.-]+", "_", tower) / dataset
        evaluators = {
            method: build_evaluator(cfg, dataset, str(folder / method)) for method, cfg in configs.items()
        }
        for method, model in models.items():
            model.set_vocabulary(dataset_vocabulary(configs[method], dataset))
            evaluators[method].reset()
        for group in _same_inputs(configs):
            loader = build_test_loader(configs[group[0]], dataset)
            total = min(args.images or len(loader), len(loader))
            batches = islice(loader, total)
            for batch in tqdm(batches, f"{tower} {dataset} {' '.join(group)}", total, unit="image"):
                for method in group:
                    evaluators[method].process(batch, models[method](batch))
                memo.clear()
        for method, evaluator in evaluators.items():
            metrics = evaluator.evaluate()["sem_seg"]
            found = {key: metrics[key] for key in METRICS if key in metrics}
            yield {"tower": tower, "dataset": dataset, "method": method, **found}


def _config(args: argparse.Namespace, method: str, benchmark: str, tower: str) -> Any:
    overrides = protocol_overrides(method, benchmark) if benchmark else ["MODEL.ZERO_SHOT.METHOD", method]
    # the CLIP is built once, outside of the config
    name = ["MODEL.CLIP.NAME", tower.partition(":")[0], "MODEL.CLIP.PRETRAINED", "random"]
    return load_config(args.config_file, [str(word) for word in (*overrides, *name, *args.opts)])


def _model(cfg: Any, clip: ClipModel, memo: Memo) -> ZeroShotSegmentor:
    clip.visual.position_rule = cfg.MODEL.CLIP.POSITION_RULE
    return ZeroShotSegmentor(**ZeroShotSegmentor.from_config(cfg, clip=clip, memo=memo)).eval()


def _same_inputs(configs: dict[str, Any]) -> list[list[str]]:
    """Group methods whose images have the same size, so that one loader serves them."""
    groups: dict[tuple[int, int], list[str]] = {}
    for method, cfg in configs.items():
        groups.setdefault((cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST), []).append(method)
    return list(groups.values())


def markdown(rows: Sequence[Row]) -> str:
    """Return a table with one row per tower, dataset and method."""
    columns = ["tower", "dataset", "method", *(m for m in METRICS if any(m in row for row in rows))]
    cells = [[row.get(column, "") for column in columns] for row in rows]
    return tabulate(cells, headers=columns, tablefmt="github", floatfmt=".1f")


if __name__ == "__main__":
    with tool_errors("interrupted; finished rows are in results.json"), torch.no_grad():
        sys.exit(main())
