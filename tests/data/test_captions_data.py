"""Datasets of images with captions, and the mapper that trains on them."""

import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from clipdense.data.caption_mapper import CaptionMapper
from clipdense.data.datasets.captions import register_captions
from clipdense.data.image import read_image
from clipdense.data.validation.report import DataError
from clipdense.run.config import add_clipdense_config

from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog


@pytest.fixture
def folder(tmp_path: Path, catalogs: None) -> Path:
    """Three images, two of them with captions beside them."""
    root = tmp_path / "pairs"
    (root / "inner").mkdir(parents=True)
    for i, name in enumerate(("a", "inner/b", "c")):
        Image.fromarray(np.full((20, 30, 3), 50 * (i + 1), np.uint8)).save(root / f"{name}.png")
    (root / "a.txt").write_text("a grey wall\n\n the wall \n", "utf-8")
    (root / "inner/b.txt").write_text("a bright wall", "utf-8")
    return root


def load(name: str, *source: str) -> list[dict[str, Any]]:
    register_captions(name, *source)
    records: list[dict[str, Any]] = DatasetCatalog.get(name)
    return records


def test_folder(folder: Path) -> None:
    records = load("of_folder", str(folder))
    assert [r["captions"] for r in records] == [["a grey wall", "the wall"], ["a bright wall"]]
    assert [Path(r["file_name"]).name for r in records] == ["a.png", "b.png"]
    (folder / "a.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(DataError, match=r"captions of .*a\.png: not a text in UTF-8"):
        load("of_damaged", str(folder))


def test_images_without_captions_are_named(folder: Path) -> None:
    for text in folder.rglob("*.txt"):
        text.unlink()
    with pytest.raises(DataError, match="none of its 3 images has captions"):
        load("of_none", str(folder))


def test_shards_are_read_in_place(folder: Path) -> None:
    for k, names in enumerate((("a",), ("inner/b", "c"))):
        with tarfile.open(folder.parent / f"{k}.tar", "w") as tar:
            for name in names:
                for path in sorted(folder.glob(f"{name}.*")):
                    tar.add(path, arcname=f"{name}{path.suffix}")
    records = load("of_shards", str(folder.parent / "{0..1}.tar"))
    assert [r["captions"] for r in records] == [["a grey wall", "the wall"], ["a bright wall"]]
    assert [int(read_image(r["file_name"], "RGB")[0, 0, 0]) for r in records] == [50, 100]
    with pytest.raises(FileNotFoundError, match=r"2\.tar does not exist"):
        register_captions("of_missing", str(folder.parent / "{1..2}.tar"))


def test_json_and_json_lines(folder: Path) -> None:
    images = [{"id": 7, "file_name": "a.png", "height": 20, "width": 30}]
    rows = [{"id": i, "image_id": 7, "caption": c} for i, c in enumerate(("one", "two"))]
    path = folder.parent / "captions.json"
    path.write_text(json.dumps({"images": images, "annotations": rows}))
    lines = folder / "captions.jsonl"
    lines.write_text(json.dumps({"file_name": "inner/b.png", "captions": ["three"]}))
    (record,) = load("of_json", str(path), str(folder))
    assert record["captions"] == ["one", "two"] and record["file_name"] == str(folder / "a.png")
    (record,) = load("of_lines", str(lines))
    assert record["captions"] == ["three"] and Path(record["file_name"]).is_file()


def test_the_config_registers_them(folder: Path) -> None:
    from clipdense.data.datasets.own import register_from_config

    cfg = get_cfg()
    add_clipdense_config(cfg)
    cfg.DATASETS.CAPTIONS = [f"of_config:{folder}"]
    register_from_config(cfg)
    register_from_config(cfg)
    assert len(DatasetCatalog.get("of_config")) == 2
    cfg.DATASETS.CAPTIONS = ["of_config"]
    with pytest.raises(ValueError, match=r"DATASETS\.CAPTIONS: 'of_config' is not of the form name:captions"):
        register_from_config(cfg)


def test_the_mapper_crops_and_draws_a_caption(folder: Path) -> None:
    record = load("of_mapper", str(folder))[0]
    mapper = CaptionMapper(True, size=16, crop_scale=(0.5, 1.0))
    torch.manual_seed(0)
    samples = [mapper(record) for _ in range(20)]
    assert {s["caption"] for s in samples if s} == {"a grey wall", "the wall"}
    assert all(s and s["image"].shape == (3, 16, 16) and s["image"].dtype == torch.uint8 for s in samples)
    with pytest.raises(KeyError, match=r"c\.png has no captions; INPUT\.MAPPER CaptionMapper"):
        mapper({"file_name": "c.png"})


def test_a_share_of_the_captions_becomes_prompts_of_nouns(folder: Path) -> None:
    record = load("of_nouns", str(folder))[0] | {"captions": ["a red car on the green lawn"]}
    mapper = CaptionMapper(True, size=16, noun_share=0.5)
    torch.manual_seed(0)
    found = {s["caption"] for s in (mapper(record) for _ in range(60)) if s}
    prompts = found - {"a red car on the green lawn"}
    assert found != prompts and prompts
    assert all("red car" in p or "green lawn" in p for p in prompts) and len(prompts) > 6
