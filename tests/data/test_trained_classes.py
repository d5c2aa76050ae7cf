"""Weights are evaluated by class name: another order is mapped, other names are refused."""

from collections.abc import Iterator

import pytest
import torch

from clipdense.data.trained_classes import class_mapping, map_classes
from clipdense.run.config import add_clipdense_config

from detectron2.config import CfgNode, get_cfg
from detectron2.data import MetadataCatalog
from detectron2.structures import Instances

NAME = "trained_classes_toy"


@pytest.fixture(params=["thing", "stuff"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def cfg(kind: str) -> CfgNode:
    cfg = get_cfg()
    add_clipdense_config(cfg)
    cfg.MODEL.META_ARCHITECTURE = "RetinaNet" if kind == "thing" else "SemanticSegmentor"
    cfg.MODEL.RETINANET.NUM_CLASSES = cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = 3
    return cfg


@pytest.fixture
def register(kind: str) -> Iterator:
    def register(*names: str, evaluator: str = "") -> None:
        MetadataCatalog.pop(NAME, None)
        evaluator = evaluator or ("coco" if kind == "thing" else "sem_seg")
        MetadataCatalog.get(NAME).set(evaluator_type=evaluator, **{f"{kind}_classes": list(names)})

    yield register
    MetadataCatalog.pop(NAME, None)


@pytest.mark.parametrize("converted", [False, True])
def test_another_order_is_mapped(cfg: CfgNode, register, kind: str, converted: bool) -> None:
    trained = ["cat", "hot dog", "bird"]
    metadata = {"options": {"classes": trained}} if converted else {f"{kind}_classes": trained}
    register(*trained)
    assert class_mapping(cfg, metadata, NAME, "x.pth") is None
    register("Cat", "hotdog", "bird")
    assert class_mapping(cfg, metadata, NAME, "x.pth") is None
    register("bird", "cat", "hot_dog")
    assert class_mapping(cfg, metadata, NAME, "x.pth") == [1, 2, 0]


def test_other_names_are_refused(cfg: CfgNode, register, kind: str) -> None:
    metadata = {f"{kind}_classes": ["cat", "dog", "bird"]}
    message = "x.pth was trained for cat, dog, bird; dataset trained_classes_toy has"
    for names in (("cat", "dog"), ("cat", "dog", "fish"), ("cat", "dog", "bird", "fish")):
        register(*names)
        with pytest.raises(ValueError, match=f"{message} {', '.join(names)}"):
            class_mapping(cfg, metadata, NAME, "x.pth")
    register("dog", "cat", "bird", evaluator="coco_panoptic_seg")  # whose ids cannot be mapped
    with pytest.raises(ValueError, match=message):
        class_mapping(cfg, metadata, NAME, "x.pth")


def test_unknown_names_are_counted(cfg: CfgNode, register) -> None:
    register("a", "b", "c")
    assert class_mapping(cfg, {}, NAME, "x.pth") is None
    register("a", "b")
    with pytest.raises(ValueError, match="NUM_CLASSES = 3, but dataset .* has 2"):
        class_mapping(cfg, {}, NAME, "x.pth")


def test_outputs_get_the_ids_of_the_dataset() -> None:
    instances = Instances((2, 2), pred_classes=torch.tensor([0, 1, 2, 0]))
    scores = torch.stack([torch.full((2, 2), float(i)) for i in range(3)])
    labels = torch.tensor([[0, 1], [2, -1]])
    out = map_classes({"instances": instances, "sem_seg": scores, "sem_seg_labels": labels}, [1, 2, 0])
    assert out["instances"].pred_classes.tolist() == [1, 2, 0, 1]
    assert out["sem_seg"][:, 0, 0].tolist() == [2.0, 0.0, 1.0]  # the dataset's class 0 is the model's 2
    assert out["sem_seg_labels"].tolist() == [[1, 2], [0, -1]]


def test_several_classes_of_the_model_can_be_one_of_the_dataset() -> None:
    scores = torch.tensor([1.0, 4.0, 3.0, 2.0])[:, None, None].expand(4, 2, 2)
    out = map_classes({"sem_seg": scores, "sem_seg_labels": scores.argmax(0)}, [1, 0, 2, 0])
    assert out["sem_seg"][:, 0, 0].tolist() == [4.0, 1.0, 3.0]
    assert (out["sem_seg_labels"] == 0).all() and (out["sem_seg"].argmax(0) == 0).all()
