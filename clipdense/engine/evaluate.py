"""Evaluation of a model on every test dataset."""

import logging
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from clipdense.backbone.score_map import has_score_map, score_classes, score_maps
from clipdense.clip.vocabulary import Vocabulary
from clipdense.data.classes import evaluation_vocabulary
from clipdense.data.loader import build_test_loader
from clipdense.data.trained_classes import map_classes
from clipdense.engine.denormals import flush_denormals
from clipdense.engine.device import run_model
from clipdense.evaluation import build_evaluator, model_probes
from clipdense.open_vocabulary import OpenVocabularyModel

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import DatasetEvaluator, DatasetEvaluators
from detectron2.utils import comm
from detectron2.utils.logger import log_every_n_seconds

__all__ = ["evaluate_datasets", "run_inference"]

PANEL_IMAGES = 8
_LOG_SECONDS = 5
_DRAWN = {"instances", "panoptic_seg", "sem_seg", "sem_seg_labels"}

logger = logging.getLogger(__name__)


def evaluate_datasets(
    cfg: CfgNode, model: Any, final: bool = True, mappings: Mapping[str, Sequence[int]] | None = None
) -> dict[str, Any]:
    """Evaluate a model on each dataset of ``DATASETS.TEST``.

    An `OpenVocabularyModel` gets the classes of each dataset in turn. At the end its previous vocabulary is
    restored, with which training may continue.

    Args:
        cfg: the config.
        model: left in evaluation mode.
        final: whether to draw ``predictions_<dataset>.png`` as well, and ``scores_<dataset>.png`` for a model
            with a score map.
        mappings: dataset -> class of the dataset for each class of the model, for datasets that list the
            model's classes in another order, see `clipdense.data.trained_classes`.

    Returns:
        task -> metric -> value, below the dataset's name if there are several; empty except in the main
        process.

    Raises:
        ValueError: If the model cannot embed a class of a dataset; nothing has been evaluated then.
    """
    results = {}
    model.eval()
    probes = model_probes(model)
    with flush_denormals(), _vocabularies(cfg, model) as vocabularies:
        for name in cfg.DATASETS.TEST:
            keep, mapping = PANEL_IMAGES if final else 0, (mappings or {}).get(name)
            if name in vocabularies:
                vocabulary, mapping = vocabularies[name]
                model.set_vocabulary(vocabulary)
            loader, evaluator = build_test_loader(cfg, name), build_evaluator(cfg, name, probes=probes)
            results[name], shown = run_inference(
                model, loader, evaluator, keep, name, mapping, cfg.TEST.PRECISION
            )
            if final and comm.is_main_process():
                _draw(model, name, shown, cfg.OUTPUT_DIR)
    if not comm.is_main_process():
        return {}
    return results if len(results) > 1 else next(iter(results.values()))


@contextmanager
def _vocabularies(cfg: CfgNode, model: Any) -> Iterator[dict[str, tuple[Vocabulary, Sequence[int] | None]]]:
    """Yield the vocabulary of each dataset for an open-vocabulary model, and its mapping to the dataset's
    classes; nothing for other models.

    Each vocabulary is set once at the start, so that a name that cannot be embedded is reported before hours
    of evaluation. Its text is encoded only once.
    """
    if not isinstance(model, OpenVocabularyModel):
        yield {}
        return
    vocabularies: dict[str, tuple[Vocabulary, Sequence[int] | None]] = {
        name: evaluation_vocabulary(cfg, name) for name in cfg.DATASETS.TEST
    }
    before = model.vocabulary
    try:
        for name, (vocabulary, _) in vocabularies.items():
            try:
                model.set_vocabulary(vocabulary)
            except ValueError as error:
                raise ValueError(f"the classes of dataset {name}: {error}") from error
        yield vocabularies
    finally:
        if before is not None:
            model.set_vocabulary(before)


def _draw(model: nn.Module, name: str, pairs: list[tuple[dict[str, Any], Any]], folder: str) -> None:
    """Draw outputs and score maps beside the ground truth, for a few images of a dataset."""
    drawable = [(i, o) for i, o in pairs if isinstance(o, dict) and _DRAWN & o.keys() and "image_id" in i]
    if not drawable:
        return
    from clipdense.visualization.panels import (  # matplotlib takes a second to import
        draw_panel,
        draw_score_panel,
    )

    logger.info("Drawing the predictions for %d images of %s", len(drawable), name)
    start = time.perf_counter()
    records = {record["image_id"]: record for record in DatasetCatalog.get(name)}
    shown = [{**records[sample["image_id"]], "output": output} for sample, output in drawable]
    try:
        draw_panel(shown, MetadataCatalog.get(name), os.path.join(folder, f"predictions_{name}.png"))
        if has_score_map(model):
            maps = score_maps(model, [sample for sample, _ in drawable])
            draw_score_panel(shown, maps, score_classes(model), os.path.join(folder, f"scores_{name}.png"))
        logger.info("Drawn in %.1f seconds", time.perf_counter() - start)
    except Exception:  # a failed picture must not cost the metrics
        logger.exception("Cannot draw the predictions for %s", name)


def run_inference(
    model: nn.Module,
    loader: Iterable[list[dict[str, Any]]],
    evaluator: DatasetEvaluator | list[DatasetEvaluator],
    keep: int = 0,
    name: str = "",
    mapping: Sequence[int] | None = None,
    precision: str = "float32",
) -> tuple[dict[str, Any], list[tuple[dict[str, Any], Any]]]:
    """Run a model on a dataset in evaluation mode, with a progress bar.

    Args:
        model: left in evaluation mode.
        loader: yields batches.
        evaluator: one or several evaluators.
        keep: number of (input, output) pairs to return.
        name: name of the dataset, for the progress bar.
        mapping: class of the dataset for each class of the model; None if they are the same.
        precision: data type of autocast, see `clipdense.engine.device.run_model`.

    Returns:
        The evaluator's metrics (empty except in the main process), and the first pairs.
    """
    if not isinstance(evaluator, DatasetEvaluator):
        evaluator = DatasetEvaluators(evaluator)
    evaluator.reset()
    model.eval()
    pairs: list[tuple[dict[str, Any], Any]] = []
    bar = tqdm(
        loader, f"Evaluating {name}".strip(), unit="batch", disable=None if comm.is_main_process() else True
    )
    start = time.perf_counter()
    # not inference_mode: training may use what the model caches here (text embeddings, anchors)
    with torch.no_grad():
        for done, batch in enumerate(bar):
            outputs = run_model(model, batch, precision)
            if mapping is not None:
                outputs = [map_classes(output, mapping) for output in outputs]
            evaluator.process(batch, outputs)
            pairs += list(zip(batch, outputs, strict=True))[: keep - len(pairs)]
            if bar.disable:  # not a terminal
                rest = (time.perf_counter() - start) / (done + 1) * (bar.total - done - 1)
                text = f"Evaluating {name}: {done + 1}/{bar.total}, ETA {timedelta(seconds=round(rest))}"
                log_every_n_seconds(logging.INFO, text, n=_LOG_SECONDS)
    logger.info("Computing the metrics of %s", name or "the dataset")
    return evaluator.evaluate() or {}, pairs
