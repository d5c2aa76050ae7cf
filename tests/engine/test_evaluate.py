from pathlib import Path
from typing import Any

import engine_toy
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from clipdense.engine import evaluate
from clipdense.engine.evaluate import evaluate_datasets, run_inference

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.structures import Boxes, BoxMode, Instances


class Counter(DatasetEvaluator):
    def reset(self) -> None:
        self.count = 0

    def process(self, inputs: list[Any], outputs: list[Any]) -> None:
        assert not torch.is_grad_enabled()
        self.count += len(inputs)

    def evaluate(self) -> dict[str, Any]:
        return {"task": {"count": self.count}}


def test_run_inference_keeps_the_first_pairs() -> None:
    model = engine_toy.ToyNet().train()
    results, pairs = run_inference(model, engine_toy.lazy_test_loader(), [Counter()], keep=3)
    assert results == {"task": {"count": engine_toy.SIZE}} and not model.training
    assert [sample["image_id"] for sample, _ in pairs] == [0, 1, 2]
    assert all("value" in output for _, output in pairs)


def test_an_open_vocabulary_gets_each_data_sets_classes(tmp_path: Path) -> None:
    class Open(engine_toy.ToyNet):
        def set_vocabulary(self, vocabulary: Any) -> None:
            told.append(list(vocabulary.names))

    told: list[list[str]] = []
    cfg = engine_toy.toy_config(tmp_path, "DATASETS.TEST", ("toy", "toy_steep"))
    assert set(evaluate_datasets(cfg, Open())) == {"toy", "toy_steep"}
    assert told == [["thing"], ["thing"]]


@pytest.fixture
def pictures(tmp_path: Path) -> Any:
    """A data set of two images on disk."""
    records = []
    for i in range(2):
        file = tmp_path / f"{i}.png"
        Image.fromarray(np.full((20, 30, 3), 90, np.uint8)).save(file)
        box = {"bbox": [2, 3, 9, 12], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0}
        records.append(
            {"file_name": str(file), "image_id": i, "height": 20, "width": 30, "annotations": [box]}
        )
    DatasetCatalog.register("toy_pictures", lambda: records)
    MetadataCatalog.get("toy_pictures").thing_classes = ["thing"]
    yield records
    DatasetCatalog.remove("toy_pictures"), MetadataCatalog.remove("toy_pictures")


def test_panel(
    pictures: list[dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    found = Instances((20, 30), pred_boxes=Boxes([[2.0, 3.0, 9.0, 12.0]]))
    found.scores, found.pred_classes = torch.tensor([0.9]), torch.tensor([0])
    pairs = [({"image_id": r["image_id"]}, {"instances": found}) for r in pictures]
    model, other = nn.Identity(), ({"image_id": 0}, {"embedding": 1})
    evaluate._draw(model, "toy_pictures", [*pairs, other], str(tmp_path))
    drawn = tmp_path / "predictions_toy_pictures.png"
    assert Image.open(drawn).size[0] > 60
    drawn.unlink()
    evaluate._draw(model, "toy_pictures", [other], str(tmp_path))
    assert not list(tmp_path.glob("*_toy_pictures.png"))

    def broken(*args: Any) -> None:
        raise RuntimeError("no font")

    monkeypatch.setattr("clipdense.visualize.draw_panel", broken)
    evaluate._draw(model, "toy_pictures", pairs, str(tmp_path))  # costs no metrics
    assert "Cannot draw" in caplog.text and "no font" in caplog.text


def test_score_maps_get_a_panel_of_their_own(
    pictures: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate, "has_score_map", lambda model: True)
    monkeypatch.setattr(evaluate, "score_classes", lambda model: ("thing", "other"))
    monkeypatch.setattr(evaluate, "score_maps", lambda model, x: [np.eye(2, 12).reshape(2, 3, 4) for _ in x])
    found = Instances((20, 30), pred_boxes=Boxes(torch.zeros(0, 4)), scores=torch.zeros(0))
    found.pred_classes = torch.zeros(0, dtype=torch.int64)
    pairs = [({"image_id": r["image_id"]}, {"instances": found}) for r in pictures]
    evaluate._draw(nn.Identity(), "toy_pictures", pairs, str(tmp_path))
    panel = Image.open(tmp_path / "scores_toy_pictures.png")
    assert panel.width > panel.height  # three pictures across, two down
