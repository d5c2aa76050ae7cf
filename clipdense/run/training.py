"""Training and evaluation as commands run them: from arguments to printed metrics."""

from __future__ import annotations

import argparse
from dataclasses import replace

from clipdense.engine.build import evaluate_weights
from clipdense.engine.launch import launch, restarted
from clipdense.engine.report import print_results
from clipdense.engine.run_config import run_config
from clipdense.engine.trainer import Trainer
from clipdense.run.boundary import tool_errors
from clipdense.run.setup import setup

__all__ = ["INTERRUPTED", "run_arguments", "train_or_evaluate"]

INTERRUPTED = "interrupted; --resume continues a training from its last checkpoint"


def train_or_evaluate(args: argparse.Namespace) -> dict[str, float]:
    """Train or evaluate in this process, and print the metrics.

    Args:
        args: arguments of `detectron2.engine.default_argument_parser`.

    Returns:
        Metrics by name.

    Raises:
        ConfigError: If the config, its datasets or its classes are wrong.
    """
    args.resume = args.resume or restarted()
    loaded = setup(args)
    if args.eval_only:
        results = evaluate_weights(loaded.cfg, args.resume, loaded.weights, loaded.fetch_weights)
        print_results(results)
    else:
        trainer = Trainer(loaded.cfg, fetch_weights=loaded.fetch_weights)
        trainer.resume_or_load(args.resume, loaded.weights)
        loaded = replace(loaded, weights=None)  # free the memory of the file
        results = trainer.train()
    run_config(loaded.cfg).verify(results)
    return results


def run_arguments(args: argparse.Namespace) -> None:
    """Run `train_or_evaluate` in every process of the job.

    Args:
        args: as of `train_or_evaluate`, with the number of processes and their address.
    """
    launch(_process, args.num_gpus, args.num_machines, args.machine_rank, args.dist_url, args=(args,))


def _process(args: argparse.Namespace) -> None:
    """Run in a process of the launcher, which prints its own error."""
    with tool_errors(INTERRUPTED):
        train_or_evaluate(args)
