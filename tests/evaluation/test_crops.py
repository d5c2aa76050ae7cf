"""Accuracy of image classification, from base to novel classes."""

import json

import pytest
import torch

from clipdense.evaluation import build_evaluator
from clipdense.run.config import add_clipdense_config

from detectron2.config import get_cfg
from detectron2.data import MetadataCatalog


@pytest.fixture
def evaluator(tmp_path, catalogs):
    MetadataCatalog.get("crops").set(
        evaluator_type="crop_classification", thing_classes=["a", "b", "c", "d"], novel_classes=["c", "d"]
    )
    cfg = get_cfg()
    add_clipdense_config(cfg)
    return build_evaluator(cfg, "crops", str(tmp_path))


def test_groups_compete_on_their_own(evaluator, tmp_path):
    evaluator.reset()
    scores = [[5, 1, 9, 0], [1, 5, 0, 0], [0, 3, 2, 1], [0, 9, 1, 8], [0, 0, 1, 2]]
    labels = [0, 1, 2, 2, 3]
    evaluator.process(
        [{"label": label} for label in labels],
        [{"class_scores": torch.tensor(row).float()} for row in scores],
    )
    metrics = evaluator.evaluate()["classification"]
    assert metrics["n"] == 5
    assert metrics["top1"] == pytest.approx(100 * 2 / 5)  # images 1 and 4
    assert metrics["base"] == pytest.approx(100)  # a beats b, although c beats both
    assert metrics["novel"] == pytest.approx(100 * 2 / 3)  # image 3 is d among the novel ones
    assert metrics["H"] == pytest.approx(2 * 100 * (200 / 3) / (100 + 200 / 3))
    assert json.loads((tmp_path / "classification.json").read_text())["n"] == 5


def test_a_model_without_scores_is_named(evaluator):
    evaluator.reset()
    with pytest.raises(KeyError, match="CropClassificationEvaluator needs the output class_scores"):
        evaluator.process([{"label": 0}], [{"instances": None}])
