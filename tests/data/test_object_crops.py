"""Objects of a detection dataset as images of one class each."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from clipdense.data.datasets.own import register_from_config
from clipdense.data.mappers import build_mapper
from clipdense.data.object_crops import ObjectCropMapper, few_shot, object_crops

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode


@pytest.fixture
def dataset(tmp_path: Path, catalogs: None) -> str:
    """Two images; objects of classes 0, 1, 1, a crowd of class 0 and a tiny object of class 2."""
    pixels = np.zeros((40, 60, 3), np.uint8)
    pixels[10:30, 20:30] = (255, 0, 0)
    Image.fromarray(pixels).save(tmp_path / "a.png")

    def annotation(box: list[float], label: int, **more: Any) -> dict[str, Any]:
        return {"bbox": box, "bbox_mode": BoxMode.XYWH_ABS, "category_id": label, **more}

    def load() -> list[dict[str, Any]]:
        record = {"file_name": str(tmp_path / "a.png"), "height": 40, "width": 60}
        first = [annotation([20, 10, 10, 20], 0), annotation([0, 0, 9, 9], 1), annotation([0, 0, 7, 9], 2)]
        second = [annotation([30, 5, 12, 12], 1), annotation([0, 0, 20, 20], 0, iscrowd=1)]
        return [
            record | {"image_id": 1, "annotations": first},
            record | {"image_id": 2, "annotations": second},
        ]

    DatasetCatalog.register("crop_source", load)
    MetadataCatalog.get("crop_source").set(thing_classes=["red", "dark", "tiny"], novel_classes=["dark"])
    return "crop_source"


def test_objects_of_a_dataset(dataset: str) -> None:
    crops = object_crops(dataset)
    found = [(crop["image_id"], crop["label"], crop["bbox"]) for crop in crops]
    assert found == [(1, 0, (20, 10, 30, 30)), (1, 1, (0, 0, 9, 9)), (2, 1, (30, 5, 42, 17))]
    assert [crop["label"] for crop in object_crops(dataset, shots=1)] == [0, 1]


def test_more_shots_contain_fewer() -> None:
    crops = [{"label": label, "i": i} for label in (3, 1) for i in range(20)]
    drawn = {n: few_shot(crops, n, seed=2) for n in (1, 2, 4, 8, 16, 99)}
    for n, chosen in drawn.items():
        assert [c["label"] for c in chosen] == [1] * min(n, 20) + [3] * min(n, 20)
        assert all(c in drawn[99] for c in chosen) and len({(c["label"], c["i"]) for c in chosen}) == len(
            chosen
        )
    assert all(c in drawn[8] for c in drawn[2])
    assert few_shot(crops, 8, seed=2) == drawn[8] != few_shot(crops, 8, seed=3)


def test_registration(dataset: str, cfg: CfgNode) -> None:
    cfg.DATASETS.OBJECT_CROPS = ["crops_all:crop_source", "crops_few:crop_source:1:2"]
    register_from_config(cfg)
    register_from_config(cfg)
    assert len(DatasetCatalog.get("crops_all")) == 3 and len(DatasetCatalog.get("crops_few")) == 2
    metadata = MetadataCatalog.get("crops_few")
    assert (metadata.evaluator_type, metadata.novel_classes) == ("crop_classification", ["dark"])
    for entry, message in {
        "x:nothing": "nothing is not a registered dataset",
        "x:crop_source:few": "shots 'few'",
        "crops_all:crop_source:3": "already in use",
        "crops_all": "not of the form name:dataset, name:dataset:shots",
    }.items():
        cfg.DATASETS.OBJECT_CROPS = [entry]
        with pytest.raises(ValueError, match=message):
            register_from_config(cfg)


def test_the_mapper_centres_the_object(dataset: str, cfg: CfgNode) -> None:
    cfg.INPUT.MAPPER, cfg.INPUT.OBJECT_CROP.SIZE, cfg.INPUT.OBJECT_CROP.CONTEXT = "ObjectCropMapper", 32, 1.6
    sample = build_mapper(cfg, False)(object_crops(dataset)[0])
    assert sample["label"] == 0 and sample["image"].dtype == torch.uint8
    red = sample["image"][0] > 127
    assert sample["image"].shape == (3, 32, 32)
    rows, columns = red.any(1).nonzero()[:, 0], red.any(0).nonzero()[:, 0]
    assert (rows[0], rows[-1], columns[0], columns[-1]) == (6, 25, 11, 20)  # 20 x 10 pixels, centred


def test_training_crops_are_random_parts(dataset: str) -> None:
    crop = object_crops(dataset)[0]
    mapper = ObjectCropMapper(True, size=16, scale=(0.3, 0.6))
    torch.manual_seed(0)
    images = [mapper(crop)["image"] for _ in range(4)]
    torch.manual_seed(0)
    assert torch.equal(mapper(crop)["image"], images[0])
    assert not any(torch.equal(images[0], image) for image in images[1:])
    with pytest.raises(KeyError, match="list the dataset in DATASETS.OBJECT_CROPS"):
        mapper({"file_name": "a.png"})
