from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from clipdense.clip.vocabulary import Vocabulary
from clipdense.engine import evaluate
from clipdense.engine.evaluate import evaluate_datasets, run_inference
from clipdense.open_vocabulary import OpenVocabularyModel, TextEmbeddings
from tests.helpers import engine_toy

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


class Open(OpenVocabularyModel, engine_toy.ToyNet):
    """Records which vocabularies are set, and how many images run with each; it cannot embed "dog"."""

    def __init__(self) -> None:
        super().__init__()
        self.init_vocabulary(None)
        self.set_vocabulary(Vocabulary.parse("trained"))
        self.seen: list[Vocabulary] = []
        self.ran: dict[tuple[str, ...], int] = {}

    def encode_vocabulary(self, vocabulary: Vocabulary, training: bool) -> TextEmbeddings:
        if "dog" in vocabulary:
            raise ValueError("no row for 'dog'")
        return {}

    def forward(self, batch: list[dict[str, Any]]) -> Any:
        if self.vocabulary not in self.seen:
            self.seen.append(self.vocabulary)
        self.ran[self.vocabulary.names] = self.ran.get(self.vocabulary.names, 0) + len(batch)
        return super().forward(batch)


@pytest.fixture
def animals() -> Iterator[dict[str, Any]]:
    """Two datasets with classes of their own; metadata by name."""
    metadata = {
        "toy_cats": {"thing_classes": ["cat", "lynx"], "novel_classes": ["lynx"]},
        "toy_birds": {"thing_classes": ["bird"], "class_synonyms": [["bird", "fowl"]]},
    }
    for name, fields in metadata.items():
        DatasetCatalog.register(name, engine_toy.records)
        MetadataCatalog.get(name).set(evaluator_type="toy", **fields)
    yield metadata
    for name in metadata:
        DatasetCatalog.remove(name), MetadataCatalog.remove(name)


def test_each_data_set_has_its_own_words(tmp_path: Path, animals: dict[str, Any]) -> None:
    """Transfer to other datasets in one run: names, synonyms and novel classes come from the metadata."""
    cfg = engine_toy.toy_config(tmp_path, "DATASETS.TEST", ("toy", "toy_cats", "toy_birds"))
    model = Open()
    assert set(evaluate_datasets(cfg, model)) == {"toy", "toy_cats", "toy_birds"}
    assert model.ran == dict.fromkeys([("thing",), ("cat", "lynx"), ("bird",)], engine_toy.SIZE)
    cats, birds = model.seen[1:]
    assert cats.base == (True, False) and birds.base is None and birds.synonyms == (("bird", "fowl"),)
    # training goes on with its own
    assert model.vocabulary.names == ("trained",)


def test_a_data_set_can_be_predicted_in_other_words(tmp_path: Path, animals: dict[str, Any]) -> None:
    """The vocabulary may have more classes than the dataset; the outputs are mapped."""
    wide = {"vocabulary_classes": ["cat", "lynx", "sky"], "vocabulary_mapping": [1, 1, 0]}
    MetadataCatalog.get("toy_cats").set(**wide)
    model = Open()
    evaluate_datasets(engine_toy.toy_config(tmp_path, "DATASETS.TEST", ("toy_cats",)), model)
    assert model.ran == {("cat", "lynx", "sky"): engine_toy.SIZE}


def test_commas_part_synonyms_or_stand_in_names(tmp_path: Path, animals: dict[str, Any]) -> None:
    MetadataCatalog.get("toy_cats").set(stuff_classes=["sky, clouds", "grass "])
    del MetadataCatalog.get("toy_cats").thing_classes, MetadataCatalog.get("toy_cats").novel_classes
    for split, synonyms in ((True, ("sky", "clouds")), (False, ("sky, clouds",))):
        options = ("DATASETS.TEST", ("toy_cats",), "DATASETS.SPLIT_NAMES", split)
        model = Open()
        evaluate_datasets(engine_toy.toy_config(tmp_path, *options), model)
        assert model.seen[0].synonyms == (synonyms, ("grass",))


def test_words_that_the_model_cannot_take_are_said_first(tmp_path: Path, animals: dict[str, Any]) -> None:
    MetadataCatalog.get("toy_birds").class_synonyms.append(["dog"])
    MetadataCatalog.get("toy_birds").thing_classes.append("dog")
    model = Open()
    with pytest.raises(ValueError, match="the classes of dataset toy_birds: no row for 'dog'"):
        evaluate_datasets(engine_toy.toy_config(tmp_path, "DATASETS.TEST", ("toy_cats", "toy_birds")), model)
    assert not model.ran and model.vocabulary.names == ("trained",)


def test_classes_that_are_known_once_the_file_is_read(tmp_path: Path) -> None:
    def load() -> list[dict[str, Any]]:
        MetadataCatalog.get("toy_late").thing_classes = ["late"]
        return engine_toy.records()

    DatasetCatalog.register("toy_late", load)
    MetadataCatalog.get("toy_late").evaluator_type = "toy"
    try:
        model = Open()
        evaluate_datasets(engine_toy.toy_config(tmp_path, "DATASETS.TEST", ("toy_late",)), model)
        assert list(model.ran) == [("late",)]
    finally:
        DatasetCatalog.remove("toy_late"), MetadataCatalog.remove("toy_late")


@pytest.fixture
def pictures(tmp_path: Path) -> Any:
    """A dataset of two images on disk."""
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

    monkeypatch.setattr("clipdense.visualization.panels.draw_panel", broken)
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
