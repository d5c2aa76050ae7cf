"""Mask-category pairs: files, ground truth of datasets, registration."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
import pytest
from PIL import Image

from clipdense.data.datasets.mask_pairs import register_mask_pairs
from clipdense.data.datasets.own import register_from_config
from clipdense.data.loader import load_dataset_dicts
from clipdense.data.mask_pairs import (
    ground_truth_pairs,
    labelled_segments,
    pair_mask,
    read_pairs,
    segment_classes,
    write_pairs,
)

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog


def rle(mask: np.ndarray) -> dict[str, Any]:
    code = mask_util.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": list(code["size"]), "counts": code["counts"].decode()}


def square(top: int, left: int, side: int = 4) -> np.ndarray:
    mask = np.zeros((12, 16), bool)
    mask[top : top + side, left : left + side] = True
    return mask


@pytest.fixture
def pairs(tmp_path: Path) -> list[dict[str, Any]]:
    """Three pairs of two images in a folder of their own."""
    (tmp_path / "photos").mkdir()
    for name in ("a.png", "b.png"):
        Image.new("RGB", (16, 12), "white").save(tmp_path / "photos" / name)
    rows = [("a.png", 1, 2, "red kite"), ("a.png", 3, 5, "sky"), ("b.png", 2, 8, "façade")]
    return [
        {
            "file_name": name,
            "height": 12,
            "width": 16,
            "segmentation": rle(square(top, left)),
            "noun": noun,
            "score": 0.25,
        }
        for name, top, left, noun in rows
    ]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_files_give_back_what_was_written(
    suffix: str, tmp_path: Path, pairs: list[dict[str, Any]], catalogs: None, cfg: CfgNode
) -> None:
    if suffix == ".parquet":
        pytest.importorskip("pyarrow")
    del pairs[0]["score"]  # a column that the first row lacks
    path = tmp_path / f"nouns{suffix}"
    write_pairs(path, pairs)
    assert read_pairs(path) == pairs
    cfg.DATASETS.MASK_PAIRS = [f"nouns:{path}:{tmp_path / 'photos'}"]
    register_from_config(cfg)
    records = load_dataset_dicts(cfg, ["nouns"], training=True)
    assert [r["noun"] for r in records] == ["red kite", "sky", "façade"]
    assert all(Path(r["file_name"]).is_file() for r in records)
    assert np.array_equal(pair_mask(records[2]), square(2, 8))
    register_from_config(cfg)  # the same entry again
    cfg.DATASETS.MASK_PAIRS = [f"nouns:{path}:{tmp_path}"]
    with pytest.raises(ValueError, match="name nouns is already in use"):
        register_from_config(cfg)


def test_images_lie_beside_the_file_by_default(
    tmp_path: Path, pairs: list[dict[str, Any]], catalogs: None
) -> None:
    write_pairs(tmp_path / "photos" / "nouns.jsonl", pairs)
    register_mask_pairs("beside", str(tmp_path / "photos" / "nouns.jsonl"))
    assert {Path(r["file_name"]).parent for r in DatasetCatalog.get("beside")} == {tmp_path / "photos"}


def test_errors_name_file_and_line(
    tmp_path: Path, pairs: list[dict[str, Any]], catalogs: None, cfg: CfgNode
) -> None:
    path = tmp_path / "nouns.jsonl"
    lines = [json.dumps(pair) for pair in pairs]
    path.write_text("\n".join([*lines, lines[0][:40]]))
    with pytest.raises(ValueError, match=r"nouns\.jsonl, line 4: not JSON"):
        read_pairs(path)
    path.write_text("\n".join([lines[0], lines[1].replace('"noun"', '"title"')]))
    with pytest.raises(ValueError, match=r"nouns\.jsonl, pair 2 \(.*\): it lacks noun"):
        read_pairs(path)
    path.write_bytes(lines[0].encode() + b"\n" + lines[1].replace("noun", "n\xe8un").encode("latin-1"))
    with pytest.raises(ValueError, match=r"nouns\.jsonl, line 2: not JSON"):
        read_pairs(path)
    with pytest.raises(FileNotFoundError, match=r"no\.jsonl"):
        read_pairs(tmp_path / "no.jsonl")
    with pytest.raises(ValueError, match=r"\.jsonl or \.parquet"):
        write_pairs(tmp_path / "nouns.csv", pairs)
    pairs[0]["segmentation"] = {"size": [12, 16]}
    with pytest.raises(ValueError, match="mask of 'red kite' is damaged"):
        pair_mask(pairs[0])
    for entry, error, message in (
        ("nouns", ValueError, "is not of the form name:dataset"),
        ("nouns:shapes_no", ValueError, "shapes_no is neither a registered dataset"),
        ("nouns:no.jsonl", FileNotFoundError, "no.jsonl does not exist"),
    ):
        cfg.DATASETS.MASK_PAIRS = [entry]
        with pytest.raises(error, match=message):
            register_from_config(cfg)


@pytest.fixture
def world(tmp_path: Path, catalogs: None) -> str:
    """A panoptic dataset of one image: two dogs, one of a crowd, grass, and void."""
    ids = np.zeros((12, 16), np.uint8)
    ids[:6] = 7
    ids[2:5, 2:5] = 3
    ids[2:5, 8:12] = 4
    Image.fromarray(ids).save(tmp_path / "ids.png")
    semantic = np.select([ids == 7, ids == 3, ids == 4], [1, 0, 0], 255).astype(np.uint8)
    Image.fromarray(semantic).save(tmp_path / "semantic.png")
    record = {
        "file_name": str(tmp_path / "image.png"),
        "image_id": 5,
        "height": 12,
        "width": 16,
        "pan_seg_file_name": str(tmp_path / "ids.png"),
        "sem_seg_file_name": str(tmp_path / "semantic.png"),
        "segments_info": [
            {"id": 3, "category_id": 0},
            {"id": 4, "category_id": 0, "iscrowd": 1},
            {"id": 7, "category_id": 1, "iscrowd": 0},
        ],
    }
    DatasetCatalog.register("world", lambda: [record])
    MetadataCatalog.get("world").set(stuff_classes=["dog ", "grass"], ignore_label=255)
    return "world"


def test_ground_truth_of_segments(world: str) -> None:
    pairs = ground_truth_pairs(world)
    assert [pair["noun"] for pair in pairs] == ["dog", "grass"]  # the crowd is left out
    assert pair_mask(pairs[0]).sum() == 9 and pair_mask(pairs[0])[2:5, 2:5].all()
    assert pair_mask(pairs[1]).sum() == 6 * 16 - 9 - 12
    assert pairs[0]["image_id"] == 5


def test_ground_truth_of_semantic_maps(world: str) -> None:
    record = DatasetCatalog.get(world)[0]
    del record["pan_seg_file_name"]
    pairs = ground_truth_pairs(world)
    assert [pair["noun"] for pair in pairs] == ["dog", "grass"]
    assert pair_mask(pairs[0]).sum() == 9 + 12  # one mask a class
    del record["sem_seg_file_name"]
    with pytest.raises(ValueError, match="neither panoptic nor semantic"):
        labelled_segments(record)


def test_separated_panoptic_sets_have_no_names_for_their_segments() -> None:
    with pytest.raises(ValueError, match="coco_2017_val_panoptic_separated does not list things and stuff"):
        segment_classes("coco_2017_val_panoptic_separated")
    assert segment_classes("shapes_ov_panoptic_mini_val")[-1] == "tiles"
