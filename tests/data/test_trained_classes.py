"""Weights are evaluated by class name: another order is mapped, other names are refused."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import clipdense.maskformer  # noqa: F401  (registers its heads)
import clipdense.systems.denseclip  # noqa: F401
from clipdense.data.heads import HeadClasses, registered_heads
from clipdense.data.trained_classes import class_mapping, map_classes

from detectron2.data import MetadataCatalog
from detectron2.structures import Instances

NAME = "trained_classes_toy"


@pytest.fixture(params=["thing", "stuff"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=["counted", "not counted", "unknown"])
def heads(kind: str, request: pytest.FixtureRequest) -> Any:
    """The head of a detector or segmenter in a yacs config, in a LazyConfig, and of an unknown model."""
    if request.param == "unknown":
        return None
    (head,) = registered_heads("RetinaNet" if kind == "thing" else "SemanticSegmentor")
    return [(head, 3 if request.param == "counted" else None)]


@pytest.fixture
def register(kind: str) -> Iterator:
    def register(*names: str, evaluator: str = "") -> None:
        MetadataCatalog.pop(NAME, None)
        evaluator = evaluator or ("coco" if kind == "thing" else "sem_seg")
        MetadataCatalog.get(NAME).set(evaluator_type=evaluator, **{f"{kind}_classes": list(names)})

    yield register
    MetadataCatalog.pop(NAME, None)


def test_another_order_is_mapped(heads, register, kind: str) -> None:
    trained = ["cat", "hot dog", "bird"]
    metadata = {f"{kind}_classes": trained}
    register(*trained)
    assert class_mapping(heads, metadata, NAME, "x.pth") is None
    register("Cat", "hotdog", "bird")
    assert class_mapping(heads, metadata, NAME, "x.pth") is None
    register("bird", "cat", "hot_dog")
    assert class_mapping(heads, metadata, NAME, "x.pth") == [1, 2, 0]


def test_other_names_are_refused(heads, register, kind: str) -> None:
    metadata = {f"{kind}_classes": ["cat", "dog", "bird"]}
    message = "x.pth was trained for cat, dog, bird; dataset trained_classes_toy has"
    for names in (("cat", "dog"), ("cat", "dog", "fish"), ("cat", "dog", "bird", "fish")):
        register(*names)
        with pytest.raises(ValueError, match=f"{message} {', '.join(names)}"):
            class_mapping(heads, metadata, NAME, "x.pth")


def test_tasks_whose_outputs_cannot_be_mapped_are_refused(register, kind: str) -> None:
    metadata, head = {f"{kind}_classes": ["cat", "dog", "bird"]}, (HeadClasses("X", kind), 3)
    register("dog", "cat", "bird", evaluator="coco_panoptic_seg")
    with pytest.raises(
        ValueError, match=r"another order, which cannot be mapped \(for the task coco_panoptic"
    ):
        class_mapping([head], metadata, NAME, "x.pth")
    register("dog", "cat", "cat")
    twice = {f"{kind}_classes": ["cat", "dog", "cat"]}
    with pytest.raises(ValueError, match="two classes have one name"):
        class_mapping([head], twice, NAME, "x.pth")


def test_a_head_for_every_class_on_a_dataset_of_things(register, kind: str) -> None:
    (head,) = registered_heads("MaskFormer")
    metadata = {"stuff_classes": ["cat", "dog"]}
    register("dog", "cat")
    assert class_mapping([(head, 2)], metadata, NAME, "x.pth") == [1, 0]


def test_unknown_names_are_counted(heads, register) -> None:
    register("a", "b", "c")
    assert class_mapping(heads, {}, NAME, "x.pth") is None
    register("a", "b")
    if heads is None or heads[0][1] is None:
        assert class_mapping(heads, {}, NAME, "x.pth") is None
        return
    with pytest.raises(ValueError, match="NUM_CLASSES = 3, but dataset .* has 2"):
        class_mapping(heads, {}, NAME, "x.pth")


def test_heads_are_known_by_the_name_of_the_model() -> None:
    assert [h.kind for h in registered_heads("DenseCLIPRCNN")] == ["thing"]
    assert [h.kind for h in registered_heads("PanopticFPN")] == ["thing", "stuff"]
    assert registered_heads("PixelTextSupervised") is None  # its config names the wrapped model
    assert registered_heads("FVLM") is None  # an open vocabulary


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
