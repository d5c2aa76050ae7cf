"""The world's datasets, as Detectron2 sees them."""

from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from clipdense.data.datasets.own import register_from_config
from clipdense.data.loader import build_test_loader, build_train_loader, load_dataset_dicts
from clipdense.data.shapes import splits
from clipdense.data.shapes.datasets import register_shapes
from clipdense.data.shapes.world import BASE, CLASSES, GROUNDS, NOVEL

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.samplers import RepeatFactorTrainingSampler
from detectron2.structures import BitMasks

_CATALOG = [name for name in DatasetCatalog.list() if name.startswith("shapes_")]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shapes")


@pytest.fixture
def small(root: Path, catalogs, monkeypatch) -> Path:
    """The world's datasets registered anew with eight images each, six of them mini."""
    for name in _CATALOG:
        DatasetCatalog.pop(name)
        MetadataCatalog.pop(name)
    for name, split in splits.SPLITS.items():
        monkeypatch.setitem(splits.SPLITS, name, replace(split, images=8))
    for name in splits.MINI:
        monkeypatch.setitem(splits.MINI, name, 6)
    register_shapes(root)
    return root


def test_names():
    kinds = ("", "panoptic_", "sem_seg_")
    expected = {
        f"shapes_{f}_{k}{m}{s}"
        for f in ("closed", "ov")
        for k in kinds
        for m in ("", "mini_")
        for s in ("train", "val")
    }
    expected |= {f"shapes_{f}_{k}tiny_train" for f in ("closed", "ov") for k in kinds}
    expected |= {f"shapes_shift_{k}val" for k in kinds}
    expected |= {f"shapes_{f}_{s}" for f in ("lvis", "clip") for s in ("train", "val")}
    assert set(_CATALOG) == expected


def test_metadata():
    base = [CLASSES[k] for k in BASE]
    novel = [CLASSES[k] for k in sorted(NOVEL)]
    meta = MetadataCatalog.get
    assert meta("shapes_closed_train").thing_classes == list(CLASSES)
    assert meta("shapes_closed_train").get("novel_classes") is None
    assert meta("shapes_ov_train").thing_classes == base and meta("shapes_ov_train").novel_classes == []
    for name in ("shapes_ov_val", "shapes_ov_mini_val", "shapes_shift_val", "shapes_ov_panoptic_val"):
        assert meta(name).novel_classes == novel
        kinds = meta(name).novel_kinds
        assert sorted(kinds["novel_shape"] + kinds["novel_combination"]) == sorted(novel)
        assert (len(kinds["novel_shape"]), len(kinds["novel_combination"])) == (16, 4)
    assert meta("shapes_ov_sem_seg_train").stuff_classes == [*base, *GROUNDS]
    # base classes have the same category ids in training and validation files
    train, val = (meta(f"shapes_ov_{s}").thing_dataset_id_to_contiguous_id for s in ("train", "val"))
    assert all(CLASSES[val[k]] == base[i] for k, i in train.items())
    evaluators = {
        "shapes_closed_val": "coco",
        "shapes_ov_panoptic_val": "coco_panoptic_seg",
        "shapes_shift_sem_seg_val": "sem_seg",
        "shapes_lvis_val": "lvis",
        "shapes_clip_val": "clip_retrieval",
    }
    assert {name: meta(name).evaluator_type for name in evaluators} == evaluators


def test_closed_and_mini(small):
    mini, full = (DatasetCatalog.get(f"shapes_closed_{m}train") for m in ("mini_", ""))
    assert len(mini) == 6 and len(full) == 8 and full[:6] == mini
    assert Path(MetadataCatalog.get("shapes_closed_train").json_file).is_file()
    assert all(Path(d["file_name"]).is_file() and (d["height"], d["width"]) == (256, 256) for d in full)
    assert all(0 < a["visible"] <= 1 for d in full for a in d["annotations"])


def test_base_training_set_has_no_novel_annotation(small):
    closed = {d["image_id"]: d for d in DatasetCatalog.get("shapes_closed_train")}
    ov = DatasetCatalog.get("shapes_ov_train")
    for record in ov:
        everything = closed[record["image_id"]]["annotations"]
        kept = [a for a in everything if a["category_id"] in BASE]
        assert [BASE[a["category_id"]] for a in record["annotations"]] == [a["category_id"] for a in kept]
        assert kept
    assert {a["category_id"] in NOVEL for d in closed.values() for a in d["annotations"]} == {True, False}


@pytest.mark.parametrize("family", ["closed", "ov"])
def test_panoptic(small, family: str):
    name = f"shapes_{family}_panoptic_train"
    things = len(BASE if family == "ov" else CLASSES)
    metadata = MetadataCatalog.get(name)
    assert len(metadata.thing_classes) == len(metadata.stuff_classes) == things + 8
    for record in DatasetCatalog.get(name):
        semantic = np.asarray(Image.open(record["sem_seg_file_name"]))
        panoptic = np.asarray(Image.open(record["pan_seg_file_name"]))[..., 0]
        for segment in record["segments_info"]:
            assert segment["isthing"] == (segment["category_id"] < things)
            assert (semantic[panoptic == segment["id"]] == segment["category_id"]).all()
        void = ~np.isin(panoptic, [s["id"] for s in record["segments_info"]])
        assert np.array_equal(void, semantic == 255)
        ids = sorted(s["category_id"] for s in record["segments_info"] if s["isthing"])
        assert ids == sorted(a["category_id"] for a in record["annotations"])


def test_semantic(small):
    assert DatasetCatalog.get("shapes_closed_sem_seg_val")[0].keys() == {
        "file_name", "image_id", "height", "width", "sem_seg_file_name",
    }  # fmt: skip


def test_shift(small):
    images = [
        np.asarray(Image.open(DatasetCatalog.get(name)[0]["file_name"]))
        for name in ("shapes_closed_val", "shapes_shift_val")
    ]
    assert not np.array_equal(*images)
    assert len(DatasetCatalog.get("shapes_shift_panoptic_val")) == 8


def test_lvis(small):
    dicts = DatasetCatalog.get("shapes_lvis_train")
    assert all(Path(d["file_name"]).is_file() and len(d["neg_category_ids"]) == 8 for d in dicts)
    assert {a["category_id"] for d in dicts for a in d["annotations"]} <= set(range(80))
    groups = MetadataCatalog.get("shapes_lvis_train").class_image_count
    assert [g["frequency"] for g in groups] == list(splits.FREQUENCY)
    assert (RepeatFactorTrainingSampler.repeat_factors_from_category_frequency(dicts, 0.5) >= 1).all()


def test_clip(small):
    record = DatasetCatalog.get("shapes_clip_train")[3]
    assert len(record["captions"]) == 5 and record["annotations"][0].keys() >= {
        "bbox",
        "category_id",
        "visible",
    }
    labels = np.asarray(Image.open(record["sem_seg_file_name"]))
    assert labels.max() >= 80 and set(np.unique(labels)) <= set(range(88))


def test_loaders(small, cfg):
    cfg.DATASETS.TRAIN, cfg.INPUT.FORMAT, cfg.INPUT.RANDOM_FLIP = ("shapes_ov_panoptic_train",), "RGB", "none"
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN = (256,), 256
    for batch in islice(build_train_loader(cfg), 2):
        for sample in batch:
            labels, instances = sample["sem_seg"], sample["instances"]
            assert sample["image"].dtype == torch.uint8 and sample["image"].shape == (3, 256, 256)
            assert isinstance(instances.gt_masks, BitMasks)  # RLE, whatever INPUT.MASK_FORMAT says
            for mask, category in zip(instances.gt_masks.tensor, instances.gt_classes, strict=True):
                assert (labels[mask] == category).all()
            assert labels.max() == 255 or labels.max() < 68
    assert len([x for batch in build_test_loader(cfg, "shapes_ov_val") for x in batch]) == 8


def test_mask_pairs_of_base_annotations_name_no_novel_class(small, cfg):
    novel = {CLASSES[k] for k in NOVEL}
    sources = ("shapes_closed_panoptic_mini_train", "shapes_ov_panoptic_mini_train")
    cfg.DATASETS.MASK_PAIRS = [f"every:{sources[0]}", f"base:{sources[1]}"]
    register_from_config(cfg)
    every, base, both = (
        load_dataset_dicts(cfg, names, training=True) for names in (["every"], ["base"], ["every", "base"])
    )
    assert novel & {pair["noun"] for pair in every}  # the same images show some
    assert base and not novel & {pair["noun"] for pair in base}
    assert len(both) == len(every) + len(base)  # a mixture, uniform over pairs
