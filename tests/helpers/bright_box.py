"""A detector that is right by construction: one box around what is bright, named after its colour."""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from clipdense.clip.vocabulary import Vocabulary
from clipdense.open_vocabulary import OpenVocabularyModel, TextEmbeddings

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import Boxes, Instances

CLASSES = ["red box", "green/box", "blue box"]

_number = itertools.count()


@META_ARCH_REGISTRY.register()
class BrightBox(nn.Module):
    """Instances; its one weight is the level from which a pixel (RGB) is bright."""

    def __init__(self, cfg: CfgNode | None = None) -> None:
        super().__init__()
        self.level = nn.Parameter(torch.tensor(999.0))

    def forward(self, batch: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [self.find(sample) for sample in batch]

    def find(self, sample: dict[str, Any]) -> dict[str, Any]:
        image = sample["image"].float()
        rows, columns = (image.amax(0) > self.level).nonzero().unbind(1)
        found = Instances(tuple(image.shape[1:]))
        boxes, classes, scores = torch.zeros(0, 4), torch.zeros(0, dtype=torch.long), torch.zeros(0)
        if len(rows):
            boxes = torch.stack([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])[None].float()
            color = image[:, rows, columns].mean(1)
            classes, scores = color.argmax()[None], color.amax()[None] / 255
        found.pred_boxes, found.pred_classes, found.scores = Boxes(boxes), classes, scores
        found.pred_masks = torch.ones(len(boxes), 1, 28, 28)
        return {"instances": detector_postprocess(found, sample["height"], sample["width"])}


@META_ARCH_REGISTRY.register()
class BrightPanoptic(BrightBox):
    """All three outputs: the box is class 2, everything else class 0."""

    def find(self, sample: dict[str, Any]) -> dict[str, Any]:
        output = super().find(sample)
        inside = output["instances"].pred_masks.any(0)
        segments = [
            {"id": 1, "category_id": 0, "isthing": False},
            {"id": 2, "category_id": 2, "isthing": True},
        ]
        scores = torch.stack([(~inside).float(), torch.zeros_like(inside).float(), inside.float()])
        return {**output, "sem_seg": scores, "panoptic_seg": (1 + inside.int(), segments)}


@META_ARCH_REGISTRY.register()
class OpenBrightBox(OpenVocabularyModel, BrightBox):
    """Boxes of the class whose name holds their colour ("red", "green", "blue"), if there is one.

    `embedder` (a `TextEmbedder`), where a test sets it, embeds the classes as a real model's does.
    """

    embedder: Any = None

    def __init__(self, cfg: CfgNode | None = None) -> None:
        super().__init__(cfg)
        self.init_vocabulary(None)

    def encode_vocabulary(self, vocabulary: Vocabulary, training: bool) -> TextEmbeddings:
        return {} if self.embedder is None else {"classes": self.embedder(vocabulary)}

    def find(self, sample: dict[str, Any]) -> dict[str, Any]:
        output = super().find(sample)
        assert self.vocabulary is not None
        color = output["instances"].pred_classes
        named = [[c in name for name in self.vocabulary.names] for c in ("red", "green", "blue")]
        classes = torch.tensor(named).int()[color].argmax(1)
        found = torch.tensor(named).any(1)[color]
        output["instances"].pred_classes = classes
        output["instances"] = output["instances"][found]
        return output


@META_ARCH_REGISTRY.register()
class OpenBrightMap(OpenBrightBox):
    """A semantic map and segments: the box is the class that names its colour, the rest the last class."""

    def find(self, sample: dict[str, Any]) -> dict[str, Any]:
        output = super().find(sample)
        assert self.vocabulary is not None and self.vocabulary.thing is not None
        found, last = output.pop("instances"), len(self.vocabulary) - 1
        box = int(found.pred_classes[0])
        inside = found.pred_masks.any(0)
        scores = torch.zeros(last + 1, *inside.shape)
        scores[box] = inside.float()
        scores[last] += 0.5
        segments = [
            {"id": i, "category_id": c, "isthing": self.vocabulary.thing[c]} for i, c in ((1, last), (2, box))
        ]
        return {"sem_seg": scores, "panoptic_seg": (1 + inside.int(), segments)}


@contextmanager
def dataset(records: list[dict[str, Any]] | None = None, classes: list[str] | None = None) -> Iterator[str]:
    """A registered dataset, while the block lasts; its name."""
    name = f"bright_box_{next(_number)}"
    DatasetCatalog.register(name, lambda: records or [])
    if classes:
        MetadataCatalog.get(name).set(thing_classes=classes, stuff_classes=classes)
    try:
        yield name
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.get(name)
        MetadataCatalog.remove(name)


def write_model(folder: Path, name: str = "", architecture: str = "BrightBox", **noted: Any) -> Path:
    """Write ``model.pth``, noting classes, and the config that names it and the dataset ``name``."""
    weights = folder / "model.pth"
    torch.save({"model": {"level": torch.tensor(128.0)}, "metadata": noted}, weights)
    config = folder / f"{architecture}.yaml"
    config.write_text(
        f"""
MODEL: {{META_ARCHITECTURE: {architecture}, DEVICE: cpu, WEIGHTS: {weights}}}
DATASETS: {{TEST: [{name}], TRAIN: []}}
INPUT: {{FORMAT: RGB, MIN_SIZE_TEST: 96, MAX_SIZE_TEST: 128}}
VERSION: 2
"""
    )
    return config


def scene(color: tuple[int, int, int] = (0, 0, 220)) -> np.ndarray:
    """(60, 80, 3) uint8 RGB, black except for a box at columns 20 to 49 and rows 10 to 29."""
    image = np.zeros((60, 80, 3), np.uint8)
    image[10:30, 20:50] = color
    return image


BOX = [20.0, 10.0, 50.0, 30.0]


def check_box(
    output: dict[str, Any], category: int = 2, box: list[float] = BOX, size: tuple[int, int] = (60, 80)
) -> None:
    """Assert that an output has the one detection of `scene`, up to blur from resizing."""
    instances = output["instances"]
    assert instances.image_size == size
    assert instances.pred_classes.tolist() == [category]
    torch.testing.assert_close(instances.pred_boxes.tensor, torch.tensor([box]), atol=1.0, rtol=0)
    assert instances.pred_masks.shape == (1, *size)
