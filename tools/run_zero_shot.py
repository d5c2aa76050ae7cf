#!/usr/bin/env python
"""Compare training-free segmentation methods: a table over methods, datasets and CLIPs, no training.

    python tools/run_zero_shot.py --table projects/ZeroShot/tables/shapes.yaml
    python tools/run_zero_shot.py --towers ViT-B-16-quickgelu:openai --methods sclip naclip proxyclip \\
        --benchmarks voc21 context59 --opts MODEL.DEVICE cuda

A table file (clipdense/systems/training_free/sweep.py) lists towers, methods and their settings; options of
the command line replace its entries. With benchmarks, every method has its published settings (short side,
windows, thresholds, class names); without, all methods have those of the config. Methods with the same
windows share one forward of CLIP for each image. A method that does not fit a CLIP is a row that says why.

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
    parser.add_argument("--table", type=Path, metavar="FILE.yaml", help="table file")
    parser.add_argument(
        "--config-file",
        metavar="FILE",
        help="config of a ZeroShotSegmentor (default: that of the table, or "
        "projects/ZeroShot/configs/Base-ZeroShot.yaml)",
    )
    parser.add_argument(
        "--towers",
        nargs="+",
        metavar="NAME[:WEIGHTS]",
        help="open_clip models with a tag or weight file, such as ViT-B-16-quickgelu:openai, or nano CLIPs",
    )
    parser.add_argument("--methods", nargs="+", metavar="METHOD")
    parser.add_argument(
        "--benchmarks",
        nargs="+",
        metavar="NAME",
        help="voc21, voc20, context60, context59, coco_object, coco_stuff, cityscapes, ade20k (default: the "
        "datasets of the config)",
    )
    parser.add_argument("--images", type=int, metavar="N", help="use the first N images only (default: all)")
    parser.add_argument(
        "--output", type=Path, default=Path("output/zero_shot"), metavar="DIR", help="default: %(default)s"
    )
    parser.add_argument(
        "--opts", nargs=argparse.REMAINDER, default=[], metavar="KEY VALUE", help="config overrides"
    )
    args = parser.parse_args(argv)
    if args.table is None and not (args.towers and args.methods):
        parser.error("give --table, or --towers and --methods")
    return args


if __name__ == "__main__":
    parse_arguments()  # --help and wrong options end here, before the imports that take seconds

from dataclasses import replace

import torch
from tabulate import tabulate
from tqdm import tqdm

import clipdense  # noqa: F401
from clipdense.clip import ClipModel, load_clip
from clipdense.data.classes import dataset_vocabulary
from clipdense.data.datasets.own import register_from_config
from clipdense.data.loader import build_test_loader
from clipdense.evaluation.build import build_evaluator
from clipdense.files import json_text, write_text
from clipdense.run.boundary import tool_errors
from clipdense.run.setup import available_device, load_config
from clipdense.systems.training_free import Memo, Sweep, Variant, ZeroShotSegmentor, load_sweep

Row = dict[str, Any]
METRICS = ("mIoU", "mIoU_base", "mIoU_novel", "pACC")
COLUMNS = ("tower", "dataset", "method", "images", "classes", *METRICS, "note")


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    sweep = sweep_from_arguments(args)
    rows: list[Row] = []
    for tower in sweep.towers:
        name, _, weights = tower.partition(":")
        clip = load_clip(name, weights or None)
        for benchmark in sweep.benchmarks or [""]:
            for row in evaluate(args, sweep, clip, tower, benchmark):
                rows.append(row)
                write_text(args.output / "results.json", json_text(rows, indent=1) + "\n")
    table = markdown(rows)
    write_text(args.output / "table.md", table + "\n")
    print(table)
    return 0


def sweep_from_arguments(args: argparse.Namespace) -> Sweep:
    """Read the table file, if there is one; options of the command line replace its entries."""
    variants = [Variant(method, method) for method in args.methods or ()]
    given = {
        "towers": args.towers,
        "variants": variants,
        "config": args.config_file,
        "benchmarks": args.benchmarks,
        "images": args.images,
    }
    given = {key: value for key, value in given.items() if value}
    return Sweep(**given) if args.table is None else replace(load_sweep(args.table), **given)


def evaluate(
    args: argparse.Namespace, sweep: Sweep, clip: ClipModel, tower: str, benchmark: str
) -> Iterator[Row]:
    """Evaluate all methods on the datasets of one benchmark; methods with equal windows share forwards."""
    configs = {v.name: _config(args, sweep, v, benchmark, tower) for v in sweep.variants}
    first = next(iter(configs.values()))
    register_from_config(first)
    device = available_device(first.MODEL.DEVICE)
    clip.to(device)
    memo = Memo()
    models: dict[str, ZeroShotSegmentor] = {}
    notes: dict[str, str] = {}
    for name, cfg in configs.items():
        try:
            models[name] = _model(cfg, clip, memo).to(device)
        except ValueError as error:
            notes[name] = str(error)
            tqdm.write(f"{tower}, {name}: left out: {error}", file=sys.stderr)
    for dataset in first.DATASETS.TEST:
        scores = _evaluate_dataset(args, sweep, configs, models, tower, dataset, memo)
        for name in configs:
            row: Row = {"tower": tower, "dataset": dataset, "method": name}
            yield {**row, **(scores[name] if name in scores else {"note": notes[name]})}


def _evaluate_dataset(
    args: argparse.Namespace,
    sweep: Sweep,
    configs: dict[str, Any],
    models: dict[str, ZeroShotSegmentor],
    tower: str,
    dataset: str,
    memo: Memo,
) -> dict[str, Row]:
    """Return the numbers of images and classes, and the metrics, of each model on a dataset."""
    folder = args.output / "inference" / re.sub(r"[^\w.-]+", "_", tower) / dataset
    evaluators = {
        name: build_evaluator(configs[name], dataset, str(folder / re.sub(r"[^\w.-]+", "_", name)))
        for name in models
    }
    classes, images = 0, 0
    for name, model in models.items():
        vocabulary = dataset_vocabulary(configs[name], dataset)
        model.set_vocabulary(vocabulary)
        evaluators[name].reset()
        classes = len(vocabulary)
    for group in _same_inputs({name: configs[name] for name in models}):
        loader = build_test_loader(configs[group[0]], dataset)
        images = min(sweep.images or len(loader), len(loader))
        for batch in tqdm(islice(loader, images), f"{tower} {dataset}, {len(group)} methods", images):
            for name in group:
                evaluators[name].process(batch, models[name](batch))
            memo.clear()
    scores = {}
    for name, evaluator in evaluators.items():
        metrics = evaluator.evaluate()["sem_seg"]
        found = {key: metrics[key] for key in METRICS if key in metrics}
        scores[name] = {"images": images, "classes": classes, **found}
    return scores


def _config(args: argparse.Namespace, sweep: Sweep, variant: Variant, benchmark: str, tower: str) -> Any:
    # the CLIP is built once, outside of the config
    name = ["MODEL.CLIP.NAME", tower.partition(":")[0], "MODEL.CLIP.PRETRAINED", "random"]
    return load_config(
        sweep.config, [*variant.config_overrides(benchmark, sweep.overrides), *name, *args.opts]
    )


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
    columns = [column for column in COLUMNS if any(column in row for row in rows)]
    cells = [[row.get(column, "") for column in columns] for row in rows]
    return tabulate(cells, headers=columns, tablefmt="github", floatfmt=".1f")


if __name__ == "__main__":
    with tool_errors("interrupted; finished rows are in results.json"), torch.no_grad():
        sys.exit(main())
