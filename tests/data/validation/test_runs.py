"""What a run does with faulty files: stop by name before it starts, or train on what is right."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from clipdense.data.checks import check_named_datasets, drop_objects_without_mask
from clipdense.data.datasets.layouts import load_captions, load_instances, load_lvis, load_panoptic
from clipdense.data.datasets.own import register_from_config
from clipdense.data.loader import build_train_loader, load_dataset_dicts
from clipdense.data.mask_pairs import pair_mask, read_pairs
from clipdense.data.proposals import FileProposals
from clipdense.data.validation import DataError, check_dataset, check_datasets
from clipdense.engine.run_config import run_config

from detectron2.data import DatasetCatalog, MetadataCatalog


@pytest.fixture
def own(cfg, coco_json, catalogs, tmp_path, monkeypatch) -> Callable[..., Any]:
    """Register an edited file of ten images under the name "own"; returns its config."""
    monkeypatch.setenv("CLIPDENSE_CACHE", str(tmp_path / "cache"))

    def run(edit: Callable[[dict[str, Any]], object] | None = None, folder: str = "own") -> Any:
        json_file, images = coco_json(folder=folder)
        content = json.loads(json_file.read_text())
        if edit is not None:
            edit(content)
        json_file.write_text(json.dumps(content))
        cfg.DATASETS.COCO_JSON = [f"own:{json_file}:{images}"]
        cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("own",), ("own",)
        cfg.MODEL.ROI_HEADS.NUM_CLASSES = 2
        register_from_config(cfg)
        return cfg

    return run


def without_masks(count: int) -> Callable[[dict[str, Any]], None]:
    def edit(content: dict[str, Any]) -> None:
        for row in content["annotations"][:count]:
            del row["segmentation"]

    return edit


def objects(records: list[dict[str, Any]]) -> int:
    return sum(len(record["annotations"]) for record in records)


def test_a_good_dataset_says_nothing(own):
    assert run_config(own()).check_datasets(training=True) == []


def test_null_crowd_flags_train(own):
    cfg = own(lambda c: [row.update(iscrowd=None) for row in c["annotations"]])
    assert len(load_dataset_dicts(cfg, ["own"], training=True)) == 10


def test_ids_of_text_train_in_the_order_of_the_ids(own):
    def edit(content: dict[str, Any]) -> None:
        for row in content["images"]:
            row["id"] = f"img_{row['id']:02d}"
        for row in content["categories"]:
            row["id"] = f"c{row['id']}"
        for row in content["annotations"]:
            row["image_id"], row["category_id"] = f"img_{row['image_id']:02d}", f"c{row['category_id']}"

    numbered = load_dataset_dicts(own(), ["own"], training=True)
    DatasetCatalog.remove("own")
    MetadataCatalog.remove("own")
    cfg = own(edit, folder="text")
    records = load_dataset_dicts(cfg, ["own"], training=True)
    assert MetadataCatalog.get("own").thing_classes == ["cat", "dog"]
    assert [Path(r["file_name"]).name for r in records] == [Path(r["file_name"]).name for r in numbered]
    assert [[a["category_id"] for a in r["annotations"]] for r in records] == [
        [a["category_id"] for a in r["annotations"]] for r in numbered
    ]
    assert run_config(cfg).check_datasets(training=True)  # noticed, not refused


def resize(content: dict[str, Any], width: int) -> None:
    """State another width of the first image, and drop its masks, which would be found first."""
    content["images"][0]["width"] = width
    for row in content["annotations"][:2]:
        del row["segmentation"]


FAULTS = {
    "image id": (lambda c: c["images"][0].update(id=c["images"][1]["id"]), "two images with one id"),
    "annotation id": (lambda c: [r.update(id=1) for r in c["annotations"]], "two annotations with one id"),
    "flat polygon": (
        lambda c: [r.update(segmentation=[1, 1, 5, 1, 5, 5]) for r in c["annotations"]],
        "one flat list",
    ),
    "missing image": (lambda c: c["images"][0].update(file_name="nothere.png"), "nothere.png"),
    "size": (lambda c: resize(c, 9), "images of another size than stated"),
    "no annotations": (lambda c: c.update(annotations=[]), "nothing to train on"),
}


@pytest.mark.parametrize(("edit", "message"), FAULTS.values(), ids=FAULTS.keys())
def test_a_run_stops_before_it_starts(own, edit, message):
    run = run_config(own(edit))
    with pytest.raises(DataError, match=rf"annotations\.json: .*{message}"):
        run.check_datasets(training=True)


def test_category_ids_are_checked_when_the_dataset_is_named(own):
    with pytest.raises(DataError, match=r"annotations\.json: two categories with one id: .*'hound'"):
        own(lambda c: c["categories"].append({"id": c["categories"][1]["id"], "name": "hound"}))


def test_objects_without_a_mask_are_left_out_of_training_with_masks(own, caplog):
    cfg = own(without_masks(3))
    total = objects(load_dataset_dicts(cfg, ["own"], training=True))
    cfg.MODEL.MASK_ON = True
    loader = build_train_loader(cfg, seed=0)
    assert objects(loader.dataset.items) == total - 3
    assert f"Left 3 of {total} objects and 1 images out of training with masks" in caplog.text
    loader = build_train_loader(cfg, seed=0, masks_optional=True)
    assert objects(loader.dataset.items) == total and len(loader.dataset.items) == 10
    assert f"Left 3 of {total} objects out of the mask loss" in caplog.text
    flags = [loader.dataset[i, i]["instances"].get_fields().get("gt_has_mask") for i in range(3)]
    assert flags[0].tolist() == [False, False] and flags[1].tolist() == [False, True] and flags[2] is None
    cfg.MODEL.MASK_ON = False
    assert objects(build_train_loader(cfg, seed=0).dataset.items) == total
    (message,) = run_config(cfg).check_datasets(training=True)
    assert "objects with a box but no mask" in message


def test_a_file_of_boxes_alone_needs_mask_on_false(own):
    cfg = own(without_masks(10**6))
    cfg.MODEL.MASK_ON = True
    with pytest.raises(DataError, match=r"annotations\.json: no object has a mask.*MODEL.MASK_ON False"):
        run_config(cfg).check_datasets(training=True)
    with pytest.raises(DataError, match=r"own: no object has a mask.*MODEL.MASK_ON False"):
        build_train_loader(cfg, seed=0)
    with pytest.raises(DataError, match=r"own: no object has a mask.*MODEL.MASK_ON False"):
        build_train_loader(cfg, seed=0, masks_optional=True)
    assert run_config(cfg).check_datasets(training=False) == []
    cfg.MODEL.MASK_ON = False
    assert run_config(cfg).check_datasets(training=True) == []


def test_an_image_keeps_its_crowds_and_its_masks():
    records = [
        {"file_name": "a", "annotations": [{"segmentation": [[1]]}, {"iscrowd": 1}, {}]},
        {"file_name": "b", "annotations": []},
    ]
    kept = drop_objects_without_mask(records, "x")
    assert [len(record["annotations"]) for record in kept] == [2, 0]


@pytest.mark.parametrize("name", ["../../x", "a/b", ".."])
def test_a_dataset_name_is_not_a_path(cfg, coco_json, name):
    json_file, images = coco_json()
    cfg.DATASETS.COCO_JSON = [f"{name}:{json_file}:{images}"]
    with pytest.raises(ValueError, match=r"DATASETS\.COCO_JSON: .* is a path"):
        register_from_config(cfg)


def test_a_standard_dataset_that_is_not_on_disk_is_named(catalogs):
    MetadataCatalog.get("absent").set(
        evaluator_type="coco", json_file="/nowhere/instances.json", image_root="/nowhere"
    )
    DatasetCatalog.register("absent", list)
    with pytest.raises(FileNotFoundError, match="absent: /nowhere/instances.json does not exist"):
        check_datasets(["absent"])
    assert check_datasets(["shapes_closed_val", "not_registered"]) is not None
    with pytest.raises(ValueError, match="not registered"):
        check_named_datasets(["not_registered"])


def image_list(tmp_path: Path, images: list[Any]) -> str:
    (tmp_path / "list.json").write_text(json.dumps({"images": images}))
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    return f"listed:{tmp_path}/list.json:{tmp_path}"


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([{"id": 1}], r"images\[0\] has no id and file_name"),
        (["a.png"], r"images\[0\]"),
        ([{"id": 1, "file_name": "a.png"}, {"id": 1, "file_name": "b.png"}], "two images with id 1"),
        ([], "no images"),
    ],
)
def test_lists_of_images(cfg, catalogs, tmp_path, images, message):
    cfg.DATASETS.IMAGES = [image_list(tmp_path, images)]
    register_from_config(cfg)
    with pytest.raises(DataError, match=message):
        DatasetCatalog.get("listed")


def test_images_of_a_list_are_looked_at(cfg, catalogs, tmp_path, monkeypatch):
    monkeypatch.setenv("CLIPDENSE_CACHE", str(tmp_path / "cache"))
    cfg.DATASETS.IMAGES = [image_list(tmp_path, [{"id": 1, "file_name": "a.png"}])]
    register_from_config(cfg)
    assert check_datasets([], training=["listed"]) == []
    (tmp_path / "a.png").write_text("no image")
    report = check_dataset("listed", use_cache=False)
    assert [finding.kind for finding in report.errors] == ["files that are not images"]


PAIR = {
    "file_name": "a.png",
    "height": 8,
    "width": 8,
    "segmentation": {"size": [8, 8], "counts": [8, 16, 40]},
    "noun": "cat",
}
DAMAGED = [
    {"size": [8, 8], "counts": "0"},
    {"size": [8, 8], "counts": ""},
    {"size": [8, 8], "counts": [1, 2]},
]


def test_pairs(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(PAIR))
    (pair,) = read_pairs(path)
    mask = pair_mask(pair)
    assert mask[:, 1:3].all() and mask.sum() == 16


@pytest.mark.parametrize(
    "change",
    [
        *(
            {"segmentation": rle}
            for rle in [*DAMAGED, {"size": [9, 8], "counts": [72]}, [[1, 1, 5, 1, 5, 5]]]
        ),
        {"height": "8"},
        {"width": 0},
        {"noun": 5},
        {"file_name": ["a"]},
    ],
)
def test_damaged_pairs_are_named(tmp_path, change):
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(PAIR) + "\n" + json.dumps(PAIR | change))
    with pytest.raises(ValueError, match=r"pairs\.jsonl, pair 2"):
        read_pairs(path)


@pytest.mark.parametrize("rle", DAMAGED)
def test_damaged_masks_are_never_decoded(tmp_path, rle):
    with pytest.raises(ValueError, match="a.png: the mask of 'cat' is damaged"):
        pair_mask(PAIR | {"segmentation": rle})
    path = tmp_path / "proposals.json"
    path.write_text(json.dumps([{"image_id": "x", "segmentation": rle}]))
    with pytest.raises(DataError, match=r"proposals\.json, row 0 \(image 'x'\)"):
        FileProposals(path)


@pytest.mark.parametrize("content", [{}, [5], [{"image_id": None, "segmentation": {}}], [{"image_id": 1}]])
def test_files_of_proposals_of_another_structure(tmp_path, content):
    path = tmp_path / "proposals.json"
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"proposals\.json: not a JSON list"):
        FileProposals(path)


def test_captions_with_ids_of_text(tmp_path):
    content = {
        "images": [{"id": i, "file_name": f"{i}.png", "height": 8, "width": 8} for i in ("b", "a")],
        "annotations": [
            {"id": "2", "image_id": "a", "caption": "second"},
            {"id": "1", "image_id": "a", "caption": "first"},
        ],
    }
    path = tmp_path / "captions.json"
    path.write_text(json.dumps(content))
    (record,) = load_captions(path, tmp_path)
    assert record["image_id"] == "a" and record["captions"] == ["first", "second"]
    content["annotations"][0]["caption"] = None
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"captions\.json: captions that are not text"):
        load_captions(path, tmp_path)


def test_lvis_and_coco_masks_are_what_mappers_read(tmp_path):
    counts = [8, 16, 40]
    content = {
        "images": [{"id": 5, "coco_url": "http://x/val2017/a.png", "height": 8, "width": 8}],
        "categories": [{"id": 1, "name": "cat"}],
        "annotations": [
            {"id": 1, "image_id": 5, "category_id": 1, "bbox": [1, 0, 2, 8]}
            | {"segmentation": {"size": [8, 8], "counts": counts}},
            {"id": 2, "image_id": 5, "category_id": 1, "bbox": [1, 0, 2, 8]}
            | {"segmentation": [[1, 1, 5, 1, 5, 5], [1, 1, 2, 2], []]},
        ],
    }
    path = tmp_path / "lvis.json"
    path.write_text(json.dumps(content))
    (record,) = load_lvis(path, tmp_path)
    assert record["file_name"] == str(tmp_path / "val2017" / "a.png")
    mask = pair_mask(PAIR | {"segmentation": record["annotations"][0]["segmentation"]})
    assert np.flatnonzero(mask.any(0)).tolist() == [1, 2]
    assert record["annotations"][1]["segmentation"] == [[1, 1, 5, 1, 5, 5]]  # the others are no polygons
    content["images"][0]["neg_category_ids"] = 3
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match="neg_category_ids"):
        load_lvis(path, tmp_path)
    del content["images"][0]["neg_category_ids"]
    content["images"][0]["file_name"] = "a.png"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"lvis\.json: an object has category 1"):
        load_instances(path, tmp_path, {7: 0})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"segments_info": None}, "segments_info without id and category_id"),
        ({"segments_info": [{"id": 1, "category_id": 9}]}, "segments of unknown categories"),
        ({"segments_info": [{"id": 1, "category_id": 1}] * 2}, "segments that share an id"),
        ({"file_name": "a\0b"}, "label maps whose file_name is not one of a file below their folder"),
        ({"file_name": "../p.png"}, "label maps whose file_name is not one of a file below their folder"),
    ],
)
def test_panoptic_files(tmp_path, change, message):
    annotation = {"image_id": 1, "file_name": "p.png", "segments_info": [{"id": 1, "category_id": 1}]}
    content = {
        "images": [{"id": 1, "file_name": "a.png", "height": 8, "width": 8}],
        "categories": [{"id": 1, "name": "cat", "isthing": 1}],
        "annotations": [annotation],
    }
    path = tmp_path / "panoptic.json"
    path.write_text(json.dumps(content))
    (record,) = load_panoptic(path, tmp_path, tmp_path / "maps", {1: 0}, {0})
    assert record["pan_seg_file_name"] == str(tmp_path / "maps" / "p.png")
    assert record["segments_info"] == [{"id": 1, "category_id": 0, "isthing": True}]
    annotation.update(change)
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=rf"panoptic\.json: {message}"):
        load_panoptic(path, tmp_path, tmp_path / "maps", {1: 0}, {0})
