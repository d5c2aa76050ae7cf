"""Recognition, summary and split of a user's data, through the command line."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from clipdense.data.datasets.recognise import Hints, recognise
from clipdense.data.datasets.splitting import split_keys
from clipdense.data.validation.report import DataError
from clipdense.run.data_check import check_path, split_path

from detectron2.data import DatasetCatalog

pytestmark = pytest.mark.usefixtures("catalogs")


def photos(folder: Path, count: int = 10, side: int = 32) -> list[str]:
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    names = [f"{i}.png" for i in range(count)]
    for name in names:
        Image.fromarray(rng.integers(0, 255, (side, side, 3), dtype=np.uint8)).save(folder / name)
    return names


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    """Ten images with a box each; some are suspicious."""
    names = photos(tmp_path / "set/images")
    (tmp_path / "set/images/9.png").write_bytes((tmp_path / "set/images/8.png").read_bytes())
    boxes = [[4, 4, 10, 10]] * 7 + [[0, 0, 32, 32], [5, 5, 2, 20], [3, 3, 10, 10]]
    content: dict[str, Any] = {
        "images": [{"id": i, "file_name": n, "height": 32, "width": 32} for i, n in enumerate(names)],
        "annotations": [
            {"id": i, "image_id": i, "category_id": 1, "bbox": box} for i, box in enumerate(boxes)
        ],
        "categories": [{"id": 1, "name": "Cup"}, {"id": 2, "name": "cup "}, {"id": 3, "name": "plate"}],
    }
    content["annotations"].append({"id": 10, "image_id": 0, "category_id": 1, "bbox": [4, 4, 10, 10]})
    (tmp_path / "set/all.json").write_text(json.dumps(content))
    return tmp_path / "set"


def test_check_of_coco(coco: Path, tmp_path: Path) -> None:
    result = check_path(coco, sheet=tmp_path / "sheet.png")
    text = "\n".join(result.lines)
    assert not result.faulty and result.sheets == (tmp_path / "sheet.png",)
    assert Image.open(tmp_path / "sheet.png").width > 512
    assert "set_all" not in DatasetCatalog.list()
    for expected in (
        "10 images, 11 annotations, 3 classes",
        "image sides: 32 to 32 pixels",
        "objects in an image: 1 to 2, median 1; 0 images without",
        "11 objects, 100.0 %, in 10 images",
        "noticed: boxes with a side below 3 pixels",
        "noticed: boxes of nearly the whole image",
        "noticed: two objects of one class in one place",
        "noticed: classes that never occur: cup ; plate",
        "noticed: class names that are nearly equal: 'Cup', 'cup '",
        "noticed: equal image files",
        f"DATASETS.COCO_JSON \"['set_all:{coco}/all.json:{coco}/images']\"",
        "MODEL.ROI_HEADS.NUM_CLASSES 3",
    ):
        assert expected in text, text


def test_split_of_coco(coco: Path) -> None:
    (line,) = split_path(coco, fraction=0.7, seed=1)
    assert "all_train.json" in line and "all_val.json" in line
    parts = [json.loads((coco / f"all_{part}.json").read_text()) for part in ("train", "val")]
    ids = [{image["id"] for image in part["images"]} for part in parts]
    assert [len(i) for i in ids] == [7, 3] and ids[0] | ids[1] == set(range(10))
    for part, own in zip(parts, ids, strict=True):
        assert {a["image_id"] for a in part["annotations"]} == own and len(part["categories"]) == 3
    with pytest.raises(FileExistsError, match=r"all_train\.json exists"):
        split_path(coco / "all.json", fraction=0.7, seed=2)


def test_split_keys() -> None:
    keys = list("abcdefghij")
    first = split_keys(keys, 0.8, 3)
    assert first == split_keys(keys, 0.8, 3) != split_keys(keys, 0.8, 4)
    assert sorted([*first[0], *first[1]]) == keys and len(first[0]) == 8
    assert [len(part) for part in split_keys("ab", 0.99, 0)] == [1, 1]
    with pytest.raises(ValueError, match="between 0 and 1"):
        split_keys(keys, 1.0, 0)
    with pytest.raises(DataError, match="1 images cannot be split"):
        split_keys("a", 0.5, 0)


def test_yolo_and_its_split(tmp_path: Path) -> None:
    names = photos(tmp_path / "cups/images/train")
    labels = tmp_path / "cups/labels/train"
    labels.mkdir(parents=True)
    for name in names:
        (labels / name).with_suffix(".txt").write_text("0 0.5 0.5 0.4 0.4\n")
    (tmp_path / "cups/data.yaml").write_text("names: [cup]\ntrain: images/train\n")
    (found,) = recognise(tmp_path / "cups")
    assert found.entry == f"cups_train:{tmp_path}/cups/data.yaml:train"
    (line,) = split_path(tmp_path / "cups", fraction=0.6)
    assert "cups_train_train" in line
    content = yaml.safe_load((tmp_path / "cups/split/data.yaml").read_text())
    assert content == {"names": ["cup"], "train": "train.txt", "val": "val.txt"}
    counts = {}
    for one in recognise(tmp_path / "cups/split"):
        with one.registered() as (name, _):
            counts[one.fields[1]] = len(DatasetCatalog.get(name))
    assert counts == {"train": 6, "val": 4}


def test_label_maps_and_their_split(tmp_path: Path) -> None:
    photos(tmp_path / "roads/images")
    (tmp_path / "roads/labels").mkdir()
    for i in range(10):
        values = np.full((32, 32), 255, np.uint8)
        values[:8] = i % 2
        Image.fromarray(values).save(tmp_path / f"roads/labels/{i}.png")
    with pytest.raises(DataError, match=r"no class names: write a classes\.txt there"):
        recognise(tmp_path / "roads")
    (tmp_path / "roads/classes.txt").write_text("road\ntree\n")
    text = "\n".join(check_path(tmp_path / "roads").lines)
    assert "(label maps)" in text and "road   50.0 %, in 5 images" in text
    assert "label maps that are mostly unlabelled" in text and "MODEL.SEM_SEG_HEAD.NUM_CLASSES 2" in text
    split_path(tmp_path / "roads")
    assert len((tmp_path / "roads/images/../train.txt").resolve().read_text().split()) == 8


def test_faults_are_printed_with_the_kind(tmp_path: Path) -> None:
    photos(tmp_path / "cups/images", 1)
    (tmp_path / "cups/labels").mkdir()
    (tmp_path / "cups/labels/0.txt").write_text("7 0.5 0.5 0.4 0.4\n")
    (tmp_path / "cups/data.yaml").write_text("names: [cup]\ntrain: images\n")
    result = check_path(tmp_path / "cups")
    assert result.faulty and "0.txt:1: 7" in result.lines[1]


def test_other_paths(coco: Path, tmp_path: Path) -> None:
    (found,) = recognise(coco / "images")
    assert found.key == "IMAGES"
    with pytest.raises(FileNotFoundError):
        recognise(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no data of a known format"):
        recognise(tmp_path / "empty")
    captions = tmp_path / "captions.json"
    captions.write_text('{"images": [], "annotations": [{"id": 1, "image_id": 1, "caption": "a cup"}]}')
    assert recognise(captions)[0].kind == "captions"
    (found,) = recognise(coco / "all.json", Hints(images=tmp_path))
    assert found.fields[1] == str(tmp_path)
