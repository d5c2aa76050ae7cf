"""YOLO, Pascal VOC, COCO panoptic and coloured label maps: what is read, and what is refused."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
import pytest
from PIL import Image

from clipdense.data.checks import check_dataset_names, dataset_classes
from clipdense.data.classes import dataset_vocabulary
from clipdense.data.datasets.label_tables import read_class_table
from clipdense.data.datasets.own import register_from_config
from clipdense.data.datasets.panoptic import register_panoptic
from clipdense.data.datasets.voc import register_voc
from clipdense.data.datasets.yolo import register_yolo
from clipdense.data.image import read_labels
from clipdense.data.validation import check_dataset
from clipdense.data.validation.report import DataError

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

pytestmark = pytest.mark.usefixtures("catalogs")

WIDTH, HEIGHT = 40, 20


def save_image(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (WIDTH, HEIGHT), "grey").save(path)


def objects(name: str) -> list[Any]:
    return [a for record in DatasetCatalog.get(name) for a in record["annotations"]]


# ---- YOLO


@pytest.fixture
def yolo(tmp_path: Path) -> Path:
    """A box in a.jpg, a triangle in b.jpg, nothing in c.jpg."""
    for stem in "abc":
        save_image(tmp_path / f"set/images/train/{stem}.jpg")
    labels = tmp_path / "set/labels/train"
    labels.mkdir(parents=True)
    (labels / "a.txt").write_text("1 0.5 0.5 0.5 0.2\n")
    (labels / "b.txt").write_text("0 0.25 0.25 0.75 0.25 0.5 0.75\n\n")
    (tmp_path / "set/data.yaml").write_text("path: .\ntrain: images/train\nnames:\n  0: cup\n  1: plate\n")
    return tmp_path / "set"


def test_yolo(yolo: Path, cfg: CfgNode) -> None:
    cfg.DATASETS.YOLO = [f"cups:{yolo}/data.yaml:train"]
    register_from_config(cfg)
    register_from_config(cfg)  # again: nothing changes
    box, polygon = objects("cups")
    assert box["bbox"] == pytest.approx([10, 8, 20, 4]) and box["category_id"] == 1
    assert polygon["bbox"] == pytest.approx([10, 5, 20, 10])
    assert polygon["segmentation"] == [pytest.approx([10, 5, 30, 5, 20, 15])]
    assert dataset_classes("cups", "thing") == ["cup", "plate"]
    assert dataset_vocabulary(cfg, "cups").names == ("cup", "plate")
    report = check_dataset("cups")
    assert report is not None and not report.errors and report.counts["images"] == 3
    assert "set/data.yaml (train)" in report.source


def test_yolo_folders_and_lists_are_the_same(yolo: Path) -> None:
    (yolo / "classes.txt").write_text("cup\nplate\n")
    register_yolo("folders", str(yolo / "images"), str(yolo / "labels"), str(yolo / "classes.txt"))
    (yolo / "list.txt").write_text("images/train/a.jpg\nimages/train/b.jpg\nimages/train/c.jpg\n")
    (yolo / "listed.yaml").write_text("train: [list.txt]\nnames: [cup, plate]\n")
    register_yolo("listed", str(yolo / "listed.yaml"), "train")
    assert objects("folders") == objects("listed") and len(objects("listed")) == 2


def test_yolo_is_converted_again_when_a_label_changes(yolo: Path) -> None:
    register_yolo("before", str(yolo), "train")
    path = yolo / "labels/train/a.txt"
    path.write_text("0 0.5 0.5 0.5 0.2\n")
    os.utime(path, ns=(1, 1))
    register_yolo("after", str(yolo), "train")
    assert [a["category_id"] for a in objects("after")] == [0, 0]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("2 0.5 0.5 0.5 0.2", r"class numbers without a name: .*a\.txt:1: 2"),
        ("0 10 5 20 4", r"coordinates outside 0 to 1: .*a\.txt:1"),
        ("0 0.5 0.5 0.5", r"wrong number of values: .*a\.txt:1: 4"),
        ("cup 0.5 0.5 0.5 0.2", r"lines that are not numbers: .*a\.txt:1"),
    ],
)
def test_yolo_faults_name_the_line(yolo: Path, line: str, message: str) -> None:
    (yolo / "labels/train/a.txt").write_text(line)
    with pytest.raises(DataError, match=message):
        register_yolo("faulty", str(yolo), "train")


def test_yolo_without_names_or_part(yolo: Path) -> None:
    with pytest.raises(DataError, match="no part 'val'; the file has train"):
        register_yolo("faulty", str(yolo), "val")
    (yolo / "data.yaml").write_text("train: images/train\n")
    with pytest.raises(DataError, match='no "names"'):
        register_yolo("faulty", str(yolo), "train")


# ---- Pascal VOC


def voc_xml(path: Path, *boxes: tuple[str, str, int]) -> None:
    text = f"<annotation><size><width>{WIDTH}</width><height>{HEIGHT}</height></size>"
    for name, corners, difficult in boxes:
        values = zip(("xmin", "ymin", "xmax", "ymax"), corners.split(), strict=True)
        box = "".join(f"<{tag}>{value}</{tag}>" for tag, value in values)
        text += (
            f"<object><name>{name}</name><difficult>{difficult}</difficult><bndbox>{box}</bndbox></object>"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "</annotation>")


@pytest.fixture
def voc(tmp_path: Path) -> Path:
    for stem in ("a", "b"):
        save_image(tmp_path / f"voc/JPEGImages/{stem}.jpg")
    voc_xml(tmp_path / "voc/Annotations/a.xml", ("dog", "1 1 10 5", 0), ("cat", "11 6 20 20", 1))
    voc_xml(tmp_path / "voc/Annotations/b.xml", ("cat", "3 3 4 4", 0))
    (tmp_path / "voc/ImageSets/Main").mkdir(parents=True)
    (tmp_path / "voc/ImageSets/Main/train.txt").write_text("a\n")
    return tmp_path / "voc"


def test_voc_boxes(voc: Path, cfg: CfgNode) -> None:
    cfg.DATASETS.VOC = [f"train:{voc}:train", f"every:{voc}:all"]
    register_from_config(cfg)
    dog, cat = objects("train")
    assert dataset_classes("train", "thing") == dataset_classes("every", "thing") == ["cat", "dog"]
    assert (dog["bbox"], dog["category_id"], dog["iscrowd"]) == ([0, 0, 10, 5], 1, 0)
    assert (cat["bbox"], cat["iscrowd"]) == ([10, 5, 10, 15], 1)
    assert len(objects("every")) == 3
    report = check_dataset("train")
    assert report is not None and not report.errors


def test_voc_corners_of_other_tools(voc: Path) -> None:
    voc_xml(voc / "Annotations/b.xml", ("cat", "0.5 3 4 4.5", 0))
    register_voc("plain", str(voc), "all")
    assert [a["bbox"] for a in objects("plain")][-1] == [0.5, 3, 3.5, 1.5]
    assert objects("plain")[0]["bbox"] == [1, 1, 9, 4]


def test_voc_faults(voc: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no list .*test.txt; the folder has train"):
        register_voc("faulty", str(voc), "test")
    with pytest.raises(ValueError, match="expected boxes, masks or semantic"):
        register_voc("faulty", str(voc), "train", "polygons")
    (voc / "classes.txt").write_text("dog\n")
    with pytest.raises(DataError, match=r"classes that are not listed: a\.xml: 'cat'"):
        register_voc("faulty", str(voc), "train")
    (voc / "Annotations/b.xml").write_text("<annotation>")
    with pytest.raises(DataError, match=r"b\.xml: not an XML file"):
        register_voc("faulty", str(voc), "all")


def test_voc_masks_and_label_maps(voc: Path) -> None:
    ids, labels = np.zeros((2, HEIGHT, WIDTH), np.uint8)
    ids[2:8, 4:10], ids[10:15, 20:30], labels[2:8, 4:10], labels[10:15, 20:30] = 1, 2, 8, 12
    labels[:, -1] = ids[:, -1] = 255
    for folder, values in (("SegmentationObject", ids), ("SegmentationClass", labels)):
        (voc / folder).mkdir()
        image = Image.fromarray(values, "P")
        image.putpalette(list(range(256)) * 3)
        image.save(voc / folder / "a.png")
    register_voc("masks", str(voc), "all", "masks")
    cat, dog = objects("masks")
    names = dataset_classes("masks", "thing")
    assert names is not None and (names[cat["category_id"]], names[dog["category_id"]]) == ("cat", "dog")
    assert cat["bbox"] == [4, 2, 6, 6] and np.array_equal(mask_util.decode(dog["segmentation"]), ids == 2)
    register_voc("semantic", str(voc), "all", "semantic")
    (record,) = DatasetCatalog.get("semantic")
    assert np.array_equal(read_labels(record["sem_seg_file_name"]), labels)
    assert MetadataCatalog.get("semantic").stuff_classes[:2] == ["background", "aeroplane"]


# ---- COCO panoptic


@pytest.fixture
def panoptic(tmp_path: Path) -> Path:
    """One image: sky (stuff) above, two birds (things) below, a void row between."""
    save_image(tmp_path / "images/a.jpg")
    ids = np.zeros((HEIGHT, WIDTH), np.int64)
    ids[:8], ids[10:, :15], ids[10:, 20:] = 70000, 300, 5
    (tmp_path / "pngs").mkdir()
    colours = np.stack([ids & 255, ids >> 8 & 255, ids >> 16], -1).astype(np.uint8)
    Image.fromarray(colours).save(tmp_path / "pngs/a.png")
    segments = [{"id": i, "category_id": c} for i, c in ((70000, 9), (300, 4), (5, 4))]
    content = {
        "images": [{"id": 1, "file_name": "a.jpg", "height": HEIGHT, "width": WIDTH}],
        "annotations": [{"image_id": 1, "file_name": "a.png", "segments_info": segments}],
        "categories": [{"id": 9, "name": "sky", "isthing": 0}, {"id": 4, "name": "bird", "isthing": 1}],
    }
    (tmp_path / "panoptic.json").write_text(json.dumps(content))
    return tmp_path


def test_panoptic_in_three_kinds(panoptic: Path, cfg: CfgNode) -> None:
    entry = f"{panoptic}/panoptic.json:{panoptic}/pngs:{panoptic}/images"
    cfg.DATASETS.COCO_PANOPTIC = [f"all:{entry}", f"maps:{entry}:semantic", f"things:{entry}:instances"]
    register_from_config(cfg)
    (record,) = DatasetCatalog.get("all")
    assert [s["category_id"] for s in record["segments_info"]] == [1, 0, 0]
    assert dataset_classes("all", "thing") == ["bird"] and dataset_classes("all", "stuff") == ["bird", "sky"]
    (semantic,) = DatasetCatalog.get("maps")
    for labels in (read_labels(r["sem_seg_file_name"]) for r in (record, semantic)):
        assert [labels[0, 0], labels[9, 0], labels[15, 0], labels[15, 30]] == [1, 255, 0, 0]
    assert "segments_info" not in semantic
    first, second = objects("things")
    assert dataset_classes("things", "thing") == ["bird"]
    assert (first["bbox"], second["bbox"]) == ([0, 10, 15, 10], [20, 10, 20, 10])
    for name in ("all", "maps", "things"):
        report = check_dataset(name)
        assert report is not None and not report.errors, report.lines()


def test_panoptic_faults(panoptic: Path) -> None:
    content = json.loads((panoptic / "panoptic.json").read_text())
    content["annotations"][0]["segments_info"].pop()
    (panoptic / "panoptic.json").write_text(json.dumps(content))
    paths = [str(panoptic / name) for name in ("panoptic.json", "pngs", "images")]
    register_panoptic("faulty", *paths)
    with pytest.raises(DataError, match=r"a\.png: segment 5 is not in segments_info"):
        DatasetCatalog.get("faulty")
    with pytest.raises(ValueError, match="expected panoptic, semantic or instances"):
        register_panoptic("other", *paths, "stuff")
    with pytest.raises(FileNotFoundError, match="no folder of panoptic PNGs"):
        register_panoptic("other", paths[0], "nowhere", paths[2])


# ---- colours


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("label_colors.txt", "255 0 0\troad\n0 0 255\tgreen tree\n"),
        ("class_dict.csv", "name,r,g,b\nroad,255,0,0\ngreen tree,0,0,255\n"),
        ("labelmap.txt", "# label:color_rgb:parts:actions\nroad:255,0,0::\ngreen tree:0,0,255::\n"),
        ("classes.json", '{"road": [255, 0, 0], "green tree": [0, 0, 255]}'),
    ],
)
def test_colour_tables(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    table = read_class_table(tmp_path / name)
    assert table.names == ("road", "green tree") and table.colours == ((255, 0, 0), (0, 0, 255))


def test_faults_of_colour_tables(tmp_path: Path) -> None:
    path = tmp_path / "colours.txt"
    for text, message in (
        ("255 0 0 road\nsky\n0 0 1 tree\n", r"colours\.txt:2: 'sky' has no colour"),
        ("255 0 0 road\n255 0 0 tree\n", "road and tree have one colour"),
        ("256 0 0 road\n0 0 0 tree\n", "road has the colour .256, 0, 0."),
    ):
        path.write_text(text)
        with pytest.raises(DataError, match=message):
            read_class_table(path)
    path.write_text("road\nsky\n")
    assert read_class_table(path).colours is None


def test_unknown_name_lists_the_keys() -> None:
    with pytest.raises(ValueError, match="COCO_PANOPTIC, LABEL_MAPS, YOLO or VOC"):
        check_dataset_names(["zzzz"])
