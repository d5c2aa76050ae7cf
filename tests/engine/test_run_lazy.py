"""Class names of LazyConfig models: stored in checkpoints, and mapped or refused in evaluation."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from clipdense.engine.options import ConfigError
from clipdense.engine.run_config import run_config
from clipdense.engine.run_lazy import LazyRunConfig
from clipdense.systems.denseclip import PixelTextSupervised
from clipdense.systems.fvlm import FVLM
from tests.helpers.engine_toy import ToyNet

from detectron2.config import LazyCall as L
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.modeling import GeneralizedRCNN
from detectron2.structures import Instances

NAMES = ("lazy_classes_a", "lazy_classes_b")
TRAINED = {"thing_classes": ["cat", "dog", "bird"]}


@pytest.fixture
def register(catalogs: None) -> Any:
    def register(*lists: list[str]) -> None:
        for name, classes in zip(NAMES, lists, strict=False):
            MetadataCatalog.pop(name, None)
            MetadataCatalog.get(name).set(evaluator_type="coco", thing_classes=classes)
            if name not in DatasetCatalog.list():
                DatasetCatalog.register(name, list)

    return register


class Echo(nn.Module):
    """A model that detects one object of class 0."""

    def forward(self, batch: list[Any]) -> list[Any]:
        return [{"instances": Instances((4, 4), pred_classes=torch.tensor([0]))} for _ in batch]


class Seen(DatasetEvaluator):
    def reset(self) -> None:
        self.classes: list[int] = []

    def process(self, inputs: Any, outputs: Any) -> None:
        self.classes += [c for output in outputs for c in output["instances"].pred_classes.tolist()]

    def evaluate(self) -> dict[str, Any]:
        return {"classes": self.classes}


def batches(dataset: Any) -> list[list[Any]]:
    return [[{}], [{}]]


def lazy(model: Any = None, names: Any = NAMES[:1]) -> LazyRunConfig:
    config: Any = {
        "model": model or L(Echo)(),
        "dataloader": {
            "train": {"dataset": {"names": NAMES[0]}},
            "test": L(batches)(dataset={"names": names}),
            "evaluator": L(Seen)(),
        },
        "train": {"output_dir": "", "max_iter": 1, "device": "cpu", "seed": 0},
    }
    run = run_config(OmegaConf.create(config, flags={"allow_objects": True}))
    assert isinstance(run, LazyRunConfig)
    return run


def models() -> Iterator[Any]:
    yield L(Echo)()  # unknown: what the dataset evaluates is compared
    yield L(GeneralizedRCNN)()
    yield L(PixelTextSupervised)(base=L(GeneralizedRCNN)())


@pytest.mark.parametrize("model", models(), ids=["unknown", "detector", "wrapped"])
def test_classes_are_mapped_by_name_or_refused(register: Any, model: Any) -> None:
    run = lazy(model)
    register(TRAINED["thing_classes"])
    assert run.class_mappings(TRAINED, "x.pth") == {} == run.class_mappings({}, "x.pth")
    register(["bird", "cat", "dog"])
    assert run.class_mappings(TRAINED, "x.pth") == {NAMES[0]: [1, 2, 0]}
    register(["bird", "cat", "fish"])
    with pytest.raises(ConfigError, match="x.pth was trained for cat, dog, bird; dataset lazy_classes_a has"):
        run.class_mappings(TRAINED, "x.pth")
    assert lazy(L(FVLM)()).class_mappings(TRAINED, "x.pth") == {}  # an open vocabulary


def test_several_datasets_need_one_order(register: Any) -> None:
    run = lazy(names=NAMES)
    register(["bird", "cat", "dog"], ["bird", "cat", "dog"])
    assert run.class_mappings(TRAINED, "x.pth") == dict.fromkeys(NAMES, [1, 2, 0])
    for other in (["dog", "cat", "bird"], TRAINED["thing_classes"]):
        register(["bird", "cat", "dog"], other)
        with pytest.raises(ConfigError, match="in different orders: evaluate them one by one"):
            run.class_mappings(TRAINED, "x.pth")


def test_outputs_are_evaluated_as_classes_of_the_dataset(register: Any) -> None:
    run = lazy()
    register(["bird", "cat", "dog"])
    assert run.evaluate(Echo(), mappings=run.class_mappings(TRAINED, "x.pth")) == {"classes": [1, 1]}
    assert run.evaluate(Echo()) == {"classes": [0, 0]}


def test_checkpoints_get_the_classes_of_the_training_data(register: Any) -> None:
    register(TRAINED["thing_classes"])
    assert lazy(L(ToyNet)()).options().metadata == {"datasets": [NAMES[0]], **TRAINED}
