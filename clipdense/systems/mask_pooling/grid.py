"""Search for the weights of the ensemble: one forward per image, one fusion per pair of weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from clipdense.systems.mask_pooling.meta_arch import FCCLIP

from detectron2.evaluation import DatasetEvaluator

__all__ = ["Weights", "evaluate_grid", "weight_grid"]

Weights = tuple[float, float]
"""alpha and beta of an `Ensemble`."""


def weight_grid(alphas: Sequence[float], betas: Sequence[float], base_known: bool = True) -> list[Weights]:
    """List the pairs of weights that differ in effect.

    Args:
        alphas: Weights for base classes.
        betas: Weights for novel classes.
        base_known: Whether the model knows its training classes; if not, alpha has no effect, and one alpha
            is kept.
    """
    return [(alpha, beta) for alpha in (alphas if base_known else alphas[:1]) for beta in betas]


def evaluate_grid(
    model: FCCLIP,
    loader: Iterable[list[dict[str, Any]]],
    evaluators: Mapping[Weights, DatasetEvaluator],
) -> dict[Weights, dict[str, Any]]:
    """Evaluate a model with several weights of its ensemble.

    Backbone, masks and both classifiers run once per image; only fusion, merging and scoring run for each
    pair.

    Args:
        model: Left in evaluation mode, with its own weights.
        loader: Yields batches.
        evaluators: One for each pair of weights.

    Returns:
        The result of each evaluator: task -> metric -> value; empty except in the main process.
    """
    for evaluator in evaluators.values():
        evaluator.reset()
    model.eval()
    with torch.no_grad():
        for batch in loader:
            proposals, base = model.propose(batch), model.base_flags()
            logits = model.class_logits(proposals, batch)
            for (alpha, beta), evaluator in evaluators.items():
                ensemble = replace(model.ensemble, alpha=alpha, beta=beta)
                outputs = [
                    model.merge(pair.fuse(ensemble, base), proposals.masks(b), sample)
                    for b, (pair, sample) in enumerate(zip(logits, batch, strict=True))
                ]
                evaluator.process(batch, outputs)
    return {weights: evaluator.evaluate() or {} for weights, evaluator in evaluators.items()}
