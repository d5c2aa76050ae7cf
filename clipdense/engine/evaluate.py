"""Evaluation of a model on every test set."""

import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from clipdense.backbone.score_map import has_score_map, score_classes, score_maps
from clipdense.clip.vocabulary import Vocabulary
from clipdense.data.classes import dataset_vocabulary
from clipdense.data.loader import build_test_loader
from clipdense.evaluation import build_evaluator, model_probes
from clipdense.open_vocabulary import OpenVocabularyModel

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import DatasetEvaluator, DatasetEvaluators
from detectron2.utils import comm
from detectron2.utils.logger import log_every_n_seconds

__all__ = ["evaluate_datasets", "run_inference"]

PANEL_IMAGES = 8
_DRAWN = {"instances", "panoptic_seg", "sem_seg", "sem_seg_labels"}

logger = logging.getLogger(__name__)


def evaluate_datasets(cfg: CfgNode, model: Any, final: bool = True) -> dict[str, Any]:
    """Evaluate on each of ``DATASETS.TEST``; the model is left in evaluation mode.

    An `OpenVocabularyModel` gets the classes of each dataset; its previous vocabulary is restored in the end.

    Args:
        final: whether to draw ``predictions_<data set>.png`` as well, and ``scores_<data set>.png`` of a
            model with a score map.

    Returns:
        task -> metric -> value, under the data set's name where there are several; empty but in the main
        process.

    Raises:
        ValueError: the model cannot take a data set's classes; before anything is evaluated.
    """
    results = {}
    model.eval()
    probes = model_probes(model)
    with _vocabularies(cfg, model) as vocabularies:
        for name in cfg.DATASETS.TEST:
            if name in vocabularies:
                model.set_vocabulary(vocabularies[name])
            loader, evaluator = build_test_loader(cfg, name), build_evaluator(cfg, name, probes=probes)
            results[name], shown = run_inference(model, loader, evaluator, PANEL_IMAGES if final else 0, name)
            if final and comm.is_main_process():
                _draw(model, name, shown, cfg.OUTPUT_DIR)
    if not comm.is_main_process():
        return {}
    return results if len(results) > 1 else next(iter(results.values()))


@contextmanager
def _vocabularies(cfg: CfgNode, model: Any) -> Iterator[dict[str, Vocabulary]]:
    """What an open-vocabulary model is told for each data set; nothing for a model that names fixed classes.

    All are set once, so that words without an embedding are known before hours of evaluation; text is encoded
    once however often it is set.
    """
    if not isinstance(model, OpenVocabularyModel):
        yield {}
        return
    vocabularies = {name: dataset_vocabulary(cfg, name) for name in cfg.DATASETS.TEST}
    before = model.vocabulary
    try:
        for name, vocabulary in vocabularies.items():
            try:
                model.set_vocabulary(vocabulary)
            except ValueError as error:
                raise ValueError(f"the classes of data set {name}: {error}") from error
        yield vocabularies
    finally:
        if before is not None:
            model.set_vocabulary(before)


def _draw(model: nn.Module, name: str, pairs: list[tuple[dict[str, Any], Any]], folder: str) -> None:
    """Draw the outputs, and score maps, for a few images of a data set beside the truth."""
    drawable = [(i, o) for i, o in pairs if isinstance(o, dict) and _DRAWN & o.keys() and "image_id" in i]
    if not drawable:
        return
    from clipdense.visualization.panels import (  # matplotlib takes a second to import
        draw_panel,
        draw_score_panel,
    )

    records = {record["image_id"]: record for record in DatasetCatalog.get(name)}
    shown = [{**records[sample["image_id"]], "output": output} for sample, output in drawable]
    try:
        draw_panel(shown, MetadataCatalog.get(name), os.path.join(folder, f"predictions_{name}.png"))
        if has_score_map(model):
            maps = score_maps(model, [sample for sample, _ in drawable])
            draw_score_panel(shown, maps, score_classes(model), os.path.join(folder, f"scores_{name}.png"))
    except Exception:  # whatever it is, a picture must not cost the metrics
        logger.exception("Cannot draw the predictions for %s", name)


def run_inference(
    model: nn.Module,
    loader: Iterable[list[dict[str, Any]]],
    evaluator: DatasetEvaluator | list[DatasetEvaluator],
    keep: int = 0,
    name: str = "",
) -> tuple[dict[str, Any], list[tuple[dict[str, Any], Any]]]:
    """Run ``model`` over ``loader`` in evaluation mode, with a progress bar.

    Args:
        keep: how many (input, output) pairs to return.
        name: of the data, for the bar.

    Returns:
        What the evaluator says (empty but in the main process), and the first pairs.
    """
    if not isinstance(evaluator, DatasetEvaluator):
        evaluator = DatasetEvaluators(evaluator)
    evaluator.reset()
    model.eval()
    pairs: list[tuple[dict[str, Any], Any]] = []
    bar = tqdm(
        loader, f"Evaluating {name}".strip(), unit="batch", disable=None if comm.is_main_process() else True
    )
    # not inference_mode: what a model caches here (text embeddings, anchors) may serve in training afterwards
    with torch.no_grad():
        for done, batch in enumerate(bar):
            outputs = model(batch)
            evaluator.process(batch, outputs)
            pairs += list(zip(batch, outputs, strict=True))[: keep - len(pairs)]
            if bar.disable:  # no terminal
                log_every_n_seconds(logging.INFO, f"Evaluating {name}: {done + 1}/{bar.total}", n=30)
    return evaluator.evaluate() or {}, pairs
