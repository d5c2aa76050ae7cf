"""Standard datasets in their published layouts: samples in ``CLIPDENSE_DATA``, and conversion scripts."""

import json
import runpy
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clipdense.data.checks import check_classes
from clipdense.data.datasets.layouts import load_lvis, load_sem_seg
from clipdense.data.datasets.standard import (
    ADE20K_CLASSES,
    ADE20K_THINGS,
    MAPILLARY_CLASSES,
    MAPILLARY_THINGS,
    register_standard,
)
from clipdense.data.image import read_labels
from clipdense.data.loader import build_test_loader, build_train_loader
from clipdense.data.preparation.ade20k import ade20k_panoptic
from clipdense.data.preparation.labels import convert_labels, panoptic_to_semantic
from clipdense.evaluation.build import EVALUATOR_REGISTRY

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.builtin import register_all_coco


def test_coco_sample(data_dir, cfg, catalogs):
    """Detectron2's and our names of COCO, on the sample in COCO's standard layout."""
    DatasetCatalog.clear()
    MetadataCatalog.clear()
    register_all_coco(str(data_dir))
    register_standard(data_dir)
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("coco_2017_train",), ("coco_2017_val",)
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 80
    check_classes(cfg)
    samples = [s for batch in islice(build_train_loader(cfg), 5) for s in batch]
    assert all(len(s["instances"]) and s["instances"].has("gt_masks") for s in samples)
    ids = [s["image_id"] for batch in islice(build_test_loader(cfg, "coco_2017_val"), 5) for s in batch]
    assert ids == sorted(ids) and len(ids) == 5
    cfg.DATASETS.TRAIN = ("coco_2017_train_panoptic_with_sem_seg",)
    for sample in [s for batch in islice(build_train_loader(cfg), 2) for s in batch]:
        for segment in sample["segments_info"]:
            labels = sample["sem_seg"][sample["pan_seg"] == segment["id"]]
            assert segment["iscrowd"] or (labels == segment["category_id"]).all()
    for name, images, classes in (
        ("coco_2017_val", 304, 80),
        ("coco_2017_val_panoptic_with_sem_seg", 102, 133),
        ("coco_2017_val_sem_seg", 102, 133),
        ("coco_2017_val_captions", 304, 0),
    ):
        dicts, metadata = DatasetCatalog.get(name), MetadataCatalog.get(name)
        assert len(dicts) == images
        assert len(metadata.get("stuff_classes") or metadata.get("thing_classes") or []) == classes
    assert sum(len(d["captions"]) for d in dicts) == 1521


def test_lvis_sample(data_dir):
    dicts = load_lvis(data_dir / "lvis/lvis_v0.5_val_100_images_available.json", data_dir / "lvis")
    assert len(dicts) == 62 and sum(len(d["annotations"]) for d in dicts) == 660
    assert all(Path(d["file_name"]).is_file() for d in dicts) and any(d["neg_category_ids"] for d in dicts)
    assert all(0 <= a["category_id"] < 1230 for d in dicts for a in d["annotations"])


def test_voc_sample(data_dir, tmp_path: Path):
    """PAS-20 as converted elsewhere, from the published label maps."""
    root = data_dir / "voc2012"
    dicts = load_sem_seg(root / "annotations_detectron2" / "val", root / "JPEGImages")
    assert len(dicts) == 300
    names = [Path(d["file_name"]).stem for d in dicts[:5]]
    background = lambda labels: np.where((labels == 0) | (labels == 255), 255, labels - 1)  # noqa: E731
    assert convert_labels(root / "SegmentationClass", tmp_path, background, names) == 5
    for record, name in zip(dicts, names, strict=False):
        assert np.array_equal(read_labels(tmp_path / f"{name}.png"), read_labels(record["sem_seg_file_name"]))
    assert convert_labels(root / "SegmentationClass", tmp_path, background, names) == 0


def test_semantic_maps_of_the_coco_sample(data_dir, tmp_path: Path):
    root = data_dir / "coco"
    content = json.loads((root / "annotations/panoptic_val2017.json").read_text())
    content["annotations"] = content["annotations"][:5]
    (tmp_path / "few.json").write_text(json.dumps(content))
    assert panoptic_to_semantic(tmp_path / "few.json", root / "panoptic_val2017", tmp_path / "out") == 5
    for path in (tmp_path / "out").iterdir():
        assert np.array_equal(read_labels(path), read_labels(root / "panoptic_semseg_val2017" / path.name))


@pytest.mark.parametrize("script", ["ade20k_sem_seg", "ade20k_panoptic", "pascal_voc20", "panoptic_sem_seg"])
def test_scripts(script: str, tmp_path: Path, monkeypatch, capsys):
    """Run each script on a dataset of one or two images per split."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, (6, 8)).astype(np.uint8)
    ade, voc, coco = tmp_path / "ADEChallengeData2016", tmp_path / "VOC2012", tmp_path / "coco"
    for folder in ("training", "validation"):
        for kind in ("annotations", "annotations_instance"):
            (ade / kind / folder).mkdir(parents=True)
        Image.fromarray(labels).save(ade / "annotations" / folder / "a.png")
        Image.fromarray(np.zeros((6, 8, 3), np.uint8)).save(ade / "annotations_instance" / folder / "a.png")
    (voc / "SegmentationClass").mkdir(parents=True)
    (voc / "ImageSets/Segmentation").mkdir(parents=True)
    Image.fromarray(labels).save(voc / "SegmentationClass/a.png")
    (coco / "annotations").mkdir(parents=True)
    for split in ("train", "val"):
        (voc / f"ImageSets/Segmentation/{split}.txt").write_text("a\n")
        (coco / f"panoptic_{split}2017").mkdir()
        Image.fromarray(np.stack([labels] * 3, -1)).save(coco / f"panoptic_{split}2017/a.png")
        segments = [{"id": 0x010101 * int(v), "category_id": 10 - int(v)} for v in np.unique(labels) if v]
        content = {
            "categories": [{"id": 7}, {"id": 8}, {"id": 9}],
            "annotations": [{"file_name": "a.png", "segments_info": segments}],
        }
        (coco / f"annotations/panoptic_{split}2017.json").write_text(json.dumps(content))
    path = Path(__file__).parents[2] / "datasets" / f"prepare_{script}.py"
    monkeypatch.setattr("sys.argv", [str(path), "--root", str(tmp_path)])
    runpy.run_path(str(path), run_name="__main__")
    ours = np.where(labels == 0, 255, labels - 1)
    expected = {
        "ade20k_sem_seg": (ade / "annotations_detectron2/validation/a.png", ours),
        "pascal_voc20": (voc / "annotations_detectron2/train/a.png", ours),
        "panoptic_sem_seg": (coco / "panoptic_semseg_val2017/a.png", np.where(labels == 0, 255, 3 - labels)),
        "ade20k_panoptic": (ade / "ade20k_panoptic_val/a.png", labels),  # three stuff classes, in order
    }
    written, want = expected[script]
    assert np.array_equal(read_labels(written), want)


def test_ade20k_panoptic(tmp_path: Path):
    """Instances over stuff; thing pixels without instance are void; instances equal segments."""
    door, bed = ADE20K_CLASSES.index("door"), ADE20K_CLASSES.index("bed")
    semantic = np.zeros((6, 8), np.uint8)
    semantic[:, 2:] = 1  # wall
    semantic[3:, 4:] = bed + 1
    semantic[0, 7] = door + 1  # of no instance
    objects = np.zeros((6, 8, 3), np.uint8)
    objects[3:, 4:6] = (ADE20K_THINGS.index(bed) + 1, 1, 0)
    objects[3:, 6:] = (ADE20K_THINGS.index(bed) + 1, 2, 0)
    for kind, image in (("annotations", semantic), ("annotations_instance", objects)):
        (tmp_path / kind / "validation").mkdir(parents=True)
        Image.fromarray(image).save(tmp_path / kind / "validation" / "x.png")
    ade20k_panoptic(tmp_path, "validation", "val", ADE20K_THINGS, ADE20K_CLASSES)
    content = json.loads((tmp_path / "ade20k_panoptic_val.json").read_text())
    segments = content["annotations"][0]["segments_info"]
    assert [(s["category_id"], s["area"]) for s in segments] == [(bed, 6), (bed, 6), (0, 23)]
    ids = read_labels(tmp_path / "ade20k_panoptic_val" / "x.png")
    assert ids[0, 7] == 0 and (ids[:, :2] == 0).all() and (ids[3:, 4:6] == segments[0]["id"]).all()
    instances = json.loads((tmp_path / "ade20k_instance_val.json").read_text())
    assert [a["bbox"] for a in instances["annotations"]] == [[4, 3, 2, 3], [6, 3, 2, 3]]
    assert len(instances["categories"]) == 100 and len(content["categories"]) == 150
    assert content["images"][0] == {"id": 1, "file_name": "x.jpg", "height": 6, "width": 8}


def test_missing_label_maps(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="no label maps"):
        convert_labels(tmp_path, tmp_path / "out", lambda labels: labels)
    with pytest.raises(FileNotFoundError, match="no label maps"):
        load_sem_seg(tmp_path, tmp_path)
    Image.new("L", (2, 2)).save(tmp_path / "a.png")
    with pytest.raises(FileNotFoundError, match=r"1 images.*a\.jpg"):
        load_sem_seg(tmp_path, tmp_path)


def test_registered_names():
    for name, classes in {
        "ade20k_sem_seg_val": 150,
        "pascalvoc20_sem_seg_val": 20,
        "pascalvoc21_sem_seg_train": 21,
        "coco_2017_val_sem_seg": 133,
    }.items():
        metadata = MetadataCatalog.get(name)
        assert len(metadata.stuff_classes) == classes and metadata.evaluator_type == "sem_seg"
    metadata = MetadataCatalog.get("pascalvoc20b_sem_seg_val")
    mapped = dict(zip(metadata.vocabulary_classes, metadata.vocabulary_mapping, strict=True))
    assert len(mapped) == 59 and metadata.stuff_classes[0] == "background"
    assert mapped["wall"] == 0 and metadata.stuff_classes[mapped["table"]] == "diningtable"
    assert sorted(set(mapped.values())) == list(range(21))
    metadata = MetadataCatalog.get("ade20k_panoptic_val")
    assert metadata.evaluator_type == "ade20k_panoptic_seg" and len(metadata.thing_classes) == 150
    assert len(metadata.thing_dataset_id_to_contiguous_id) == 100
    assert {"lvis_v1_train", "lvis_v1_val", "voc_2012_val", "coco_2017_train"} <= set(DatasetCatalog.list())


def test_mapillary_vistas(tmp_path: Path, catalogs):
    """Category ids count from 1 in the panoptic file, and labels from 0 in the maps."""
    assert (len(MAPILLARY_CLASSES), len(MAPILLARY_THINGS)) == (65, 37)
    folder = tmp_path / "mapillary_vistas" / "validation"
    for name in ("images", "labels", "panoptic"):
        (folder / name).mkdir(parents=True)
    road, car = MAPILLARY_CLASSES.index("Road"), MAPILLARY_CLASSES.index("Car")
    assert car in MAPILLARY_THINGS and road not in MAPILLARY_THINGS
    Image.fromarray(np.zeros((2, 3, 3), np.uint8)).save(folder / "images" / "a.jpg")
    Image.fromarray(np.full((2, 3), road, np.uint8)).save(folder / "labels" / "a.png")
    ids = np.zeros((2, 3, 3), np.uint8)
    ids[..., 0] = 7
    Image.fromarray(ids).save(folder / "panoptic" / "a.png")
    categories = [
        {"id": i + 1, "name": name, "isthing": int(i in MAPILLARY_THINGS)}
        for i, name in enumerate(MAPILLARY_CLASSES)
    ]
    segment = {"id": 7, "category_id": road + 1, "area": 6, "bbox": [0, 0, 3, 2], "iscrowd": 0}
    content = {
        "images": [{"id": "a", "file_name": "a.jpg", "height": 2, "width": 3}],
        "annotations": [{"image_id": "a", "file_name": "a.png", "segments_info": [segment]}],
        "categories": categories,
    }
    (folder / "panoptic" / "panoptic_2018.json").write_text(json.dumps(content))
    DatasetCatalog.clear()
    MetadataCatalog.clear()
    register_standard(tmp_path)
    (record,) = DatasetCatalog.get("mapillary_vistas_panoptic_val")
    assert record["segments_info"][0]["category_id"] == road
    assert Path(record["sem_seg_file_name"]).is_file()


def test_detectron2s_cityscapes_have_evaluators():
    for name in ("cityscapes_fine_panoptic_val", "cityscapes_fine_sem_seg_val"):
        assert MetadataCatalog.get(name).evaluator_type in EVALUATOR_REGISTRY
