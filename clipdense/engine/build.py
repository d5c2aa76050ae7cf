"""Model and evaluation of a run, from a yacs config or a LazyConfig."""

import logging
from pathlib import Path
from typing import Any

from torch import nn

from clipdense.checkpoint import Checkpoint
from clipdense.engine.checkpoint import TrainingCheckpointer
from clipdense.engine.report import write_results
from clipdense.engine.run_config import run_config

from detectron2.evaluation.testing import flatten_results_dict

__all__ = ["build_model", "evaluate_weights"]

logger = logging.getLogger(__name__)


def build_model(cfg: Any) -> nn.Module:
    """Build the model of a yacs config or a LazyConfig on its device, without loading weights."""
    return run_config(cfg).build_model()


def evaluate_weights(
    cfg: Any, resume: bool = False, file: Checkpoint | None = None, fetch_weights: bool = True
) -> dict[str, float]:
    """Evaluate a weight file and write its metrics to ``inference/results.json`` in the output folder.

    Args:
        cfg: yacs config or LazyConfig.
        resume: whether to evaluate the last checkpoint in the output folder instead of the weights that the
            config names.
        file: content of the weight file, if it has been read already.
        fetch_weights: False builds the backbone without downloading the weights with which it starts.

    Returns:
        Flattened metrics; empty except in the main process.

    Raises:
        CheckpointError: If the weights do not match the model, or lack some of its parameters.
        ConfigError: If the weights were trained on other classes than those of a test dataset.
    """
    run = run_config(cfg)
    options = run.options()
    model = run.build_model(fetch_weights)
    checkpointer = TrainingCheckpointer(model, options.output_dir, options.weights_skip, options.allow_pickle)
    weights = options.weights
    if resume and checkpointer.has_checkpoint():
        weights, file = checkpointer.get_checkpoint_file(), None
    if not weights:
        logger.warning("%s is empty: evaluating the model with its initial weights", run.weights_key)
    content = checkpointer.load_weights(weights, complete=True, file=file)
    mappings = run.class_mappings(content.get("metadata", {}), weights or "the config")
    results = flatten_results_dict(run.evaluate(model, True, mappings))
    if results:
        write_results(results, Path(options.output_dir, "inference"))
        logger.info("Written to %s", Path(options.output_dir, "inference", "results.json"))
    return results
