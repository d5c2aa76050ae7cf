"""Lists of images and captions that are read line by line."""

import itertools
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from clipdense.data.datasets.own import register_from_config
from clipdense.data.image import BadImageError
from clipdense.data.lines import LazyRecords
from clipdense.data.loader import build_train_loader, load_dataset_dicts
from clipdense.data.validation import check_dataset

from detectron2.config import CfgNode


def load(cfg: CfgNode, key: str, entry: str) -> Any:
    cfg.DATASETS[key], cfg.DATASETS.TRAIN = [entry], [entry.partition(":")[0]]
    register_from_config(cfg)
    return load_dataset_dicts(cfg, cfg.DATASETS.TRAIN, training=True)


def test_a_long_list_is_mapped(cfg: CfgNode, catalogs: None, tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("".join(f"{i % 7}/{i}.jpg\r\n" for i in range(200_000)))
    (tmp_path / "photos").mkdir()
    records = load(cfg, "IMAGES", f"long:{tmp_path}/list.txt:{tmp_path}/photos")
    assert isinstance(records, LazyRecords) and len(records) == 200_000
    assert records[123_456] == {"file_name": f"{tmp_path}/photos/4/123456.jpg", "image_id": 123_456}
    assert len(pickle.dumps(records)) < 2000 and records.parts == [65536, 65536, 65536, 3392]

    def mapper(record: dict[str, Any]) -> int:
        return int(record["image_id"])

    batches = [list(itertools.islice(build_train_loader(cfg, t, mapper=mapper), 3)) for t in (0, 2)]
    assert batches[0][2] == batches[1][0] and len({i for b in batches[0] for i in b}) == 12
    report = check_dataset("long", use_cache=False)
    assert report is not None and report.counts["images"] <= 501  # a sample of the files is looked for


def test_lines_with_ids_and_captions(cfg: CfgNode, catalogs: None, tmp_path: Path) -> None:
    lines: list[dict[str, Any]] = [{"file_name": "a.png", "image_id": 7}, {"file_name": "/b.png"}]
    (tmp_path / "images.jsonl").write_text("\n".join(map(json.dumps, lines)))
    records = load(cfg, "IMAGES", f"listed:{tmp_path}/images.jsonl")
    assert list(records) == [
        {"file_name": f"{tmp_path}/a.png", "image_id": 7},
        {"file_name": "/b.png", "image_id": 1},
    ]
    lines = [{"file_name": "a.png", "captions": ["one", "two"]}, {"file_name": "b.png", "captions": []}]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    records = load(cfg, "CAPTIONS", f"pairs:{tmp_path}/pairs.jsonl")
    assert records[0] == {
        "file_name": f"{tmp_path}/a.png",
        "image_id": "a.png",
        "captions": ["one", "two"],
    }
    with pytest.raises(BadImageError, match=r"b\.png: its line holds no caption"):
        records[1]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.txt", b"a.png\n\nb.png\n", r"x\.txt, line 2: it is empty"),
        ("x.txt", b"a\xff.png\n", r"x\.txt, line 1: not text in UTF-8"),
        ("x.txt", b"", r"no images in .*x\.txt"),
        ("x.jsonl", b'{"file_name": "a.png"}\n{"name": 1}\n', r"x\.jsonl, line 2: no file_name"),
        ("x.jsonl", b'["a.png"]\n', r"x\.jsonl, line 1: no file_name"),
    ],
)
def test_malformed_lines_are_named_before_training(
    cfg: CfgNode, catalogs: None, tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load(cfg, "IMAGES", f"x:{tmp_path}/{name}")


def test_a_missing_image_of_a_list_is_skipped(cfg: CfgNode, catalogs: None, tmp_path: Path) -> None:
    for i in range(3):
        Image.fromarray(np.full((40, 40, 3), i, np.uint8)).save(tmp_path / f"{i}.png")
    (tmp_path / "list.txt").write_text("0.png\n1.png\n2.png\nnone.png\n")
    load(cfg, "IMAGES", f"listed:{tmp_path}/list.txt")
    cfg.INPUT.SKIP_BAD_IMAGES = True
    batches = list(itertools.islice(build_train_loader(cfg), 3))
    assert {sample["image_id"] for batch in batches for sample in batch} == {0, 1, 2}
    cfg.INPUT.SKIP_BAD_IMAGES = False
    with pytest.raises(FileNotFoundError, match=r"none\.png"):
        list(itertools.islice(build_train_loader(cfg), 3))
