"""Loaders: exact resume, any number of workers and processes, own data, and errors before training."""

import json
import logging
import random
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from clipdense.data.checks import check_classes, check_dataset_names, clean_annotations
from clipdense.data.classes import class_names
from clipdense.data.datasets.own import register_from_config
from clipdense.data.image import BadImageError
from clipdense.data.loader import build_test_loader, build_train_loader, keyed_randomness
from clipdense.data.samplers import ResumableTrainingSampler
from clipdense.data.validation import DataError

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.structures import BoxMode
from detectron2.utils import comm

Batch = list[dict[str, Any]]


@pytest.fixture
def own(cfg, coco_json, catalogs):
    """A config that trains and tests on a registered dataset of ten images."""
    json_file, images = coco_json()
    cfg.DATASETS.COCO_JSON = [f"own_train:{json_file}:{images}", f"own_val:{json_file}:{images}"]
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("own_train",), ("own_val",)
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 2
    register_from_config(cfg)
    return cfg


def batches(cfg, count: int, start: int = 0, **options: Any) -> list[Batch]:
    return list(islice(build_train_loader(cfg, start, **options), count))


def assert_equal(a: list[Batch], b: list[Batch]) -> None:
    assert len(a) == len(b)
    for x, y in zip([s for batch in a for s in batch], [s for batch in b for s in batch], strict=True):
        assert x["image_id"] == y["image_id"] and torch.equal(x["image"], y["image"])
        assert torch.equal(x["instances"].gt_boxes.tensor, y["instances"].gt_boxes.tensor)


@pytest.mark.parametrize("grouping", [True, False])
def test_resumed_run_sees_the_same_batches(own, grouping: bool):
    own.DATALOADER.ASPECT_RATIO_GROUPING = grouping
    whole = batches(own, 8)
    assert_equal(batches(own, 3, start=5), whole[5:])
    own.SEED = 8
    assert [s["image_id"] for b in batches(own, 8) for s in b] != [s["image_id"] for b in whole for s in b]


def test_augmentation_differs_between_epochs(own):
    sizes: dict[int, set[tuple[int, ...]]] = {}
    for batch in batches(own, 12):
        for sample in batch:
            sizes.setdefault(sample["image_id"], set()).add(tuple(sample["image"].shape))
    assert any(len(s) > 1 for s in sizes.values())


def test_workers_change_nothing(own):
    here = batches(own, 4, start=2)
    own.DATALOADER.NUM_WORKERS = 2
    assert_equal(batches(own, 4, start=2), here)


@pytest.mark.parametrize("sampler", ["TrainingSampler", "RepeatFactorTrainingSampler"])
def test_two_processes_share_the_batches_of_one(own, monkeypatch, sampler: str):
    own.DATALOADER.SAMPLER_TRAIN = sampler
    whole = batches(own, 5)
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    halves = []
    for rank in range(2):
        monkeypatch.setattr(comm, "get_rank", lambda rank=rank: rank)
        halves.append(batches(own, 5))
    merged = [[s for pair in zip(a, b, strict=True) for s in pair] for a, b in zip(*halves, strict=True)]
    assert_equal(merged, whole)


def test_the_models_randomness_is_left_alone(own):
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002
    random.seed(1)
    loader = iter(build_train_loader(own))
    next(loader)
    drawn = torch.rand(1).item(), np.random.rand(), random.random()  # noqa: NPY002
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002
    random.seed(1)
    assert drawn == (torch.rand(1).item(), np.random.rand(), random.random())  # noqa: NPY002


def test_keyed_randomness_depends_on_every_part_of_the_key():
    def draw(*key: int) -> tuple[float, float, float]:
        with keyed_randomness(*key):
            return torch.rand(1).item(), np.random.rand(), random.random()  # noqa: NPY002

    assert draw(1, 2) == draw(1, 2)
    assert len({draw(1, 2), draw(2, 1), draw(1, 3), draw(0, 2), draw(-1, 2)}) == 5


def test_damaged_files_are_replaced_by_key(own, caplog):
    dicts = DatasetCatalog.get("own_train")
    for record in dicts[:3]:
        Path(record["file_name"]).write_bytes(b"gone")
    with pytest.raises(BadImageError, match=r"00\d\.png"):
        batches(own, 10)
    own.INPUT.SKIP_BAD_IMAGES = True
    with caplog.at_level(logging.WARNING):
        whole = batches(own, 8)
    assert {s["image_id"] for b in whole for s in b} == set(range(3, 10)) and "000.png" in caplog.text
    assert_equal(batches(own, 3, start=5), whole[5:])
    for record in dicts:
        Path(record["file_name"]).write_bytes(b"gone")
    with pytest.raises(RuntimeError, match="20 samples"):
        batches(own, 1)


def test_a_test_loader_stops_at_a_damaged_file(own):
    assert [s["image_id"] for batch in build_test_loader(own, "own_val") for s in batch] == list(range(10))
    Path(DatasetCatalog.get("own_val")[4]["file_name"]).write_bytes(b"gone")
    own.INPUT.SKIP_BAD_IMAGES = True
    with pytest.raises(BadImageError, match=r"004\.png"):
        list(build_test_loader(own, "own_val"))


def test_boxes_are_cleaned_and_counted(caplog):
    def item(box: list[float], mode: BoxMode = BoxMode.XYWH_ABS) -> dict[str, Any]:
        return {"bbox": box, "bbox_mode": mode, "category_id": 0}

    records = [
        {"file_name": name, "width": 20, "height": 10, "annotations": boxes}
        for name, boxes in {
            "a.png": [item([1, 1, 5, 5]), item([-4, 2, 8, 20])],
            "b.png": [item([25, 1, 5, 5]), item([3, 3, 0, 4])],
            "c.png": [item([0, 0, 20.3, 10], BoxMode.XYXY_ABS)],
            "d.png": [item([1, 1, float("nan"), 5])],
        }.items()
    ]
    with caplog.at_level(logging.WARNING):
        clean_annotations(records)
    boxes = [[a["bbox"] for a in record["annotations"]] for record in records]
    assert boxes == [[[1, 1, 5, 5], [0, 2, 4, 8]], [], [[0, 0, 20, 10]], []]  # in their own modes
    assert "1 boxes" in caplog.messages[0] and "a.png" in caplog.messages[0]
    assert "3 boxes" in caplog.messages[1] and "b.png" in caplog.messages[1]


def test_unknown_dataset():
    with pytest.raises(ValueError, match=r"'shapes_closed_trian' is not registered.*shapes_closed_train"):
        check_dataset_names(["coco_2017_val", "shapes_closed_trian"])
    with pytest.raises(ValueError, match="zzzz"):
        check_dataset_names(["zzzz"])
    with pytest.raises(ValueError, match=r"DATASETS\.TRAIN"):
        check_dataset_names([])


def test_data_that_are_not_on_disk(cfg):
    cfg.DATASETS.TRAIN = ("lvis_v1_train",)
    with pytest.raises(FileNotFoundError, match=r"lvis_v1_train: .*lvis_v1_train\.json.*datasets/README\.md"):
        build_train_loader(cfg)


def test_no_object_to_train_on(cfg, coco_json, catalogs):
    json_file, images = coco_json()
    content = json.loads(Path(json_file).read_text())
    for annotation in content["annotations"]:
        annotation["iscrowd"] = 1
    Path(json_file).write_text(json.dumps(content))
    cfg.DATASETS.COCO_JSON = [f"own_train:{json_file}:{images}"]
    cfg.DATASETS.TRAIN, cfg.MODEL.ROI_HEADS.NUM_CLASSES = ("own_train",), 2
    register_from_config(cfg)
    with pytest.raises(DataError, match=r"own_train holds no object.*iscrowd 1.*FILTER_EMPTY_ANNOTATIONS"):
        build_train_loader(cfg)


def test_unknown_sampler(own):
    own.DATALOADER.SAMPLER_TRAIN = "BestSampler"
    with pytest.raises(ValueError, match=r"SAMPLER_TRAIN = 'BestSampler'"):
        build_train_loader(own)


def test_seed_that_is_not_set(own):
    own.SEED = -1
    assert_equal(batches(own, 2, seed=5), batches(own, 2, seed=5))
    assert isinstance(build_train_loader(own).batch_sampler.sampler, ResumableTrainingSampler)


class TestOwnData:
    def test_registered_once(self, own):
        register_from_config(own)
        dicts = DatasetCatalog.get("own_train")
        assert len(dicts) == 10 and {a["category_id"] for d in dicts for a in d["annotations"]} == {0, 1}
        assert MetadataCatalog.get("own_train").thing_classes == ["cat", "dog"]

    def test_name_that_is_taken(self, own, coco_json):
        json_file, images = coco_json(folder="other")
        own.DATASETS.COCO_JSON = [f"own_train:{json_file}:{images}"]
        with pytest.raises(ValueError, match="own_train is already in use"):
            register_from_config(own)

    @pytest.mark.parametrize("entry", ["name", "name:a.json", ":a.json:b", "a:b:c:d"])
    def test_malformed_entry(self, cfg, entry: str):
        cfg.DATASETS.COCO_JSON = [entry]
        with pytest.raises(ValueError, match="name:annotations.json:image_folder"):
            register_from_config(cfg)

    def test_missing_files(self, cfg, coco_json, tmp_path):
        json_file, images = coco_json()
        cfg.DATASETS.COCO_JSON = [f"x:{tmp_path}/none.json:{images}"]
        with pytest.raises(FileNotFoundError, match=r"none\.json"):
            register_from_config(cfg)
        cfg.DATASETS.COCO_JSON = [f"x:{json_file}:{tmp_path}/none"]
        with pytest.raises(FileNotFoundError, match="no image folder"):
            register_from_config(cfg)

    def test_variables_in_paths(self, cfg, coco_json, catalogs, monkeypatch, tmp_path):
        coco_json()
        monkeypatch.setenv("MY_DATA", str(tmp_path))
        cfg.DATASETS.COCO_JSON = ["x:$MY_DATA/own/annotations.json:${MY_DATA}/own/images"]
        register_from_config(cfg)
        assert len(DatasetCatalog.get("x")) == 10


class TestClasses:
    def test_names_of_data_that_only_detectron2_has_registered(self, cfg, coco_json, catalogs):
        """Its metadata name the classes when the data are loaded, not before."""
        json_file, images = coco_json()
        register_coco_instances("registered", {}, str(json_file), str(images))
        cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("registered",), ()
        assert MetadataCatalog.get("registered").get("thing_classes") is None
        assert class_names(cfg) == ["cat", "dog"]
        with pytest.raises(ValueError, match="registered has no stuff_classes"):
            class_names(cfg, "stuff_classes")

    def test_a_head_of_the_right_size(self, own):
        check_classes(own)

    def test_a_head_of_another_size(self, own):
        own.MODEL.ROI_HEADS.NUM_CLASSES = 80
        named = r"ROI_HEADS\.NUM_CLASSES = 80.*own_train has 2 thing classes \(cat, dog\)"
        with pytest.raises(ValueError, match=named):
            check_classes(own)
        own.MODEL.META_ARCHITECTURE, own.MODEL.RETINANET.NUM_CLASSES = "RetinaNet", 3
        with pytest.raises(ValueError, match=r"RETINANET\.NUM_CLASSES = 3"):
            check_classes(own)

    def test_lists_that_differ(self, own, coco_json):
        json_file, images = coco_json(categories=("cat", "cow"), folder="cows")
        own.DATASETS.COCO_JSON = [f"cows:{json_file}:{images}"]
        register_from_config(own)
        own.DATASETS.TEST = ("cows",)
        with pytest.raises(ValueError, match="own_train and cows differ in class 1: 'dog', 'cow'"):
            check_classes(own)

    def test_base_classes_against_all(self, cfg):
        cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("shapes_ov_train",), ("shapes_ov_val",)
        cfg.MODEL.ROI_HEADS.NUM_CLASSES = 60
        with pytest.raises(ValueError, match="= 60, but dataset shapes_ov_val has 80"):
            check_classes(cfg)
        cfg.MODEL.META_ARCHITECTURE = "SomeOpenVocabularyModel"
        check_classes(cfg)

    def test_panoptic_counts_things_and_stuff(self, cfg):
        cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ("shapes_closed_panoptic_train",)
        cfg.MODEL.META_ARCHITECTURE = "PanopticFPN"
        cfg.MODEL.ROI_HEADS.NUM_CLASSES, cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = 80, 88
        check_classes(cfg)
        cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ("shapes_closed_train",)
        with pytest.raises(ValueError, match="no stuff classes"):
            check_classes(cfg)


def test_not_json(cfg, coco_json, catalogs):
    json_file, images = coco_json()
    json_file.write_text(json_file.read_text()[:100])
    cfg.DATASETS.COCO_JSON = [f"x:{json_file}:{images}"]
    with pytest.raises(ValueError, match=r"annotations\.json: not a JSON file"):
        register_from_config(cfg)
    json_file.write_text("[]")
    with pytest.raises(ValueError, match=r"annotations\.json: no list of categories"):
        register_from_config(cfg)


@pytest.mark.parametrize(("key", "value"), [("image_id", None), ("category_id", 77), ("bbox", [])])
def test_not_coco(cfg, coco_json, catalogs, key: str, value: Any):
    json_file, images = coco_json()
    content = json.loads(json_file.read_text())
    content["annotations"][3][key] = value
    if value is None:
        del content["annotations"][3][key]
    json_file.write_text(json.dumps(content))
    cfg.DATASETS.COCO_JSON, cfg.DATASETS.TRAIN = [f"x:{json_file}:{images}"], ("x",)
    register_from_config(cfg)
    with pytest.raises(ValueError, match=rf"dataset x: .*annotations\.json.*{key}"):
        build_train_loader(cfg)
