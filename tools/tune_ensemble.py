#!/usr/bin/env python
"""Find the weights of FC-CLIP's ensemble on a dataset: one forward per image, one fusion per pair of weights.

    tools/tune_ensemble.py --config-file configs/shapes/fcclip_vit.yaml MODEL.WEIGHTS fcclip.pth
    tools/tune_ensemble.py --config-file ... --alpha 0.2,0.4,0.6 --metric panoptic_seg/PQ

ALPHA weighs CLIP's scores of base classes and BETA those of novel classes (MODEL.MASK_POOLING.ENSEMBLE).
Writes the metrics of each pair to grid.json and pictures of the chosen metrics to grid.png. Tune on other
images than those that you report.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

METRICS = ("panoptic_seg/PQ", "panoptic_seg/PQ_base", "panoptic_seg/PQ_novel", "sem_seg/mIoU")
STEPS = [round(0.2 * i, 1) for i in range(6)]


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", required=True, help="config of an FC-CLIP")
    parser.add_argument(
        "--output", type=Path, default=Path("output/grid"), help="folder to write to (default: %(default)s)"
    )
    parser.add_argument(
        "--dataset", default="", help="registered dataset (default: the first of DATASETS.TEST)"
    )
    for name in ("alpha", "beta"):
        parser.add_argument(
            f"--{name}", type=weights, default=STEPS, help="0..1, separated by commas (default: %(default)s)"
        )
    parser.add_argument(
        "--metric",
        type=lambda text: text.split(","),
        default=METRICS,
        help="task/metric to draw, separated by commas, if the dataset has it (default: %(default)s)",
    )
    parser.add_argument(
        "opts", nargs="*", metavar="KEY VALUE", help="config overrides, e.g. MODEL.WEIGHTS FILE"
    )
    return parser.parse_args(argv)


def weights(text: str) -> list[float]:
    """Parse weights in 0..1 that commas separate."""
    values = sorted({float(part) for part in text.split(",")})
    if not 0 <= values[0] <= values[-1] <= 1:
        raise argparse.ArgumentTypeError("weights must lie in 0..1")
    return values


if __name__ == "__main__":
    parse_arguments()  # --help and wrong options end here, before the imports that take seconds

from tqdm import tqdm

import clipdense  # noqa: F401
from clipdense.data.checks import check_named_datasets
from clipdense.data.classes import dataset_vocabulary
from clipdense.data.datasets.own import register_from_config
from clipdense.data.loader import build_test_loader
from clipdense.engine.build import build_model
from clipdense.engine.checkpoint import TrainingCheckpointer
from clipdense.engine.options import ConfigError
from clipdense.evaluation import build_evaluator
from clipdense.files import json_text, write_text
from clipdense.run.boundary import tool_errors
from clipdense.run.setup import available_device, load_config
from clipdense.systems.mask_pooling import FCCLIP
from clipdense.systems.mask_pooling.grid import evaluate_grid, weight_grid
from clipdense.visualization.heatmap import draw_heatmaps


def metric_value(results: dict[str, Any], metric: str) -> float:
    """Return a metric "task/name" of results; NaN if there is none."""
    task, _, name = metric.partition("/")
    return float(results.get(task, {}).get(name, float("nan")))


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    cfg = load_config(arguments.config_file, arguments.opts)
    name = arguments.dataset or next(iter(cfg.DATASETS.TEST), "")
    register_from_config(cfg)
    check_named_datasets([name])
    if cfg.MODEL.META_ARCHITECTURE != "FCCLIP" or not cfg.MODEL.WEIGHTS:
        raise ConfigError("tuning needs MODEL.META_ARCHITECTURE FCCLIP and trained MODEL.WEIGHTS")
    cfg.defrost()
    cfg.MODEL.DEVICE = available_device(cfg.MODEL.DEVICE)
    model = build_model(cfg)
    assert isinstance(model, FCCLIP)
    checkpointer = TrainingCheckpointer(model, "", cfg.MODEL.WEIGHTS_SKIP, cfg.MODEL.ALLOW_PICKLE)
    checkpointer.load_weights(cfg.MODEL.WEIGHTS, complete=True)
    model.set_vocabulary(dataset_vocabulary(cfg, name))
    grid = weight_grid(arguments.alpha, arguments.beta, model.base_flags() is not None)
    loader = build_test_loader(cfg, name)  # draws the embedded data before evaluators read it
    evaluators = {
        pair: build_evaluator(cfg, name, str(arguments.output / f"alpha_{pair[0]}_beta_{pair[1]}"))
        for pair in grid
    }
    results = evaluate_grid(model, tqdm(loader, unit="batch"), evaluators)
    rows = [{"alpha": alpha, "beta": beta, **results[alpha, beta]} for alpha, beta in grid]
    write_text(arguments.output / "grid.json", json_text({"dataset": name, "rows": rows}))
    alphas = list(dict.fromkeys(alpha for alpha, _ in grid))
    tables = {
        metric: [[metric_value(results[a, b], metric) for b in arguments.beta] for a in alphas]
        for metric in arguments.metric
    }
    tables = {metric: table for metric, table in tables.items() if any(v == v for row in table for v in row)}
    if not tables:
        raise ConfigError(f"the results of {name} have none of the metrics {', '.join(arguments.metric)}")
    titles = {"row_title": "alpha (base)", "column_title": "beta (novel)"}
    draw_heatmaps(
        tables,
        [f"{a:g}" for a in alphas],
        [f"{b:g}" for b in arguments.beta],
        arguments.output / "grid.png",
        **titles,
    )
    for metric in tables:
        known = [pair for pair in grid if metric_value(results[pair], metric) >= 0]  # not NaN
        alpha, beta = max(known, key=lambda pair: metric_value(results[pair], metric))
        print(f"{metric}: {metric_value(results[alpha, beta], metric):.2f} at alpha {alpha:g}, beta {beta:g}")
    return 0


if __name__ == "__main__":
    with tool_errors():
        sys.exit(main())
