"""A user's own label maps: registration from the config, what is read, and what is refused."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clipdense.data.datasets.own import register_from_config
from clipdense.data.image import read_labels
from clipdense.data.loader import build_train_loader
from clipdense.data.validation.report import DataError
from clipdense.evaluation import build_evaluator

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

LABELS = np.array([[0, 1, 2, 7], [2, 1, 0, 7]], np.uint8).repeat(16, 0).repeat(16, 1)


@pytest.fixture
def roads(tmp_path: Path) -> Path:
    """Two images, one with a palette map, in subfolders."""
    for folder in ("images/a", "images/b", "labels/a", "labels/b"):
        (tmp_path / folder).mkdir(parents=True)
    image = Image.fromarray(np.zeros((*LABELS.shape, 3), np.uint8))
    image.save(tmp_path / "images/a/1.jpg")
    image.save(tmp_path / "images/b/1.png")
    image.save(tmp_path / "images/b/unlabelled.png")
    Image.fromarray(LABELS).save(tmp_path / "labels/a/1.png")
    palette = Image.fromarray(LABELS, "P")
    palette.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255] + [9, 9, 9] * 253)
    palette.save(tmp_path / "labels/b/1.png")
    (tmp_path / "classes.txt").write_text("road\nsidewalk\ngreen tree\n")
    return tmp_path


def entry(root: Path, *more: str) -> str:
    return ":".join(["roads", f"{root}/images", f"{root}/labels", f"{root}/classes.txt", *more])


def test_grey_and_palette_maps(roads: Path, catalogs: None, cfg: CfgNode, tmp_path: Path) -> None:
    cfg.DATASETS.LABEL_MAPS, cfg.DATASETS.TRAIN = [entry(roads, "7")], ("roads",)
    register_from_config(cfg)
    register_from_config(cfg)  # again: nothing changes
    metadata = MetadataCatalog.get("roads")
    assert metadata.stuff_classes == ["road", "sidewalk", "green tree"] and metadata.ignore_label == 255
    records = DatasetCatalog.get("roads")
    assert [r["image_id"] for r in records] == ["a/1", "b/1"]
    for record in records:
        assert np.array_equal(read_labels(record["sem_seg_file_name"]), np.where(LABELS == 7, 255, LABELS))
    cfg.SOLVER.IMS_PER_BATCH = 1
    sample = next(iter(build_train_loader(cfg)))[0]
    assert set(sample["sem_seg"].unique().tolist()) == {0, 1, 2, 255}
    build_evaluator(cfg, "roads", str(tmp_path / "out"))


def labels_of(cfg: CfgNode, text: str) -> list[np.ndarray]:
    """The labels of the dataset "roads" as models get them."""
    if "roads" in DatasetCatalog.list():
        DatasetCatalog.remove("roads")
        MetadataCatalog.remove("roads")
    cfg.DATASETS.LABEL_MAPS = [text]
    register_from_config(cfg)
    return [read_labels(record["sem_seg_file_name"]) for record in DatasetCatalog.get("roads")]


def test_plain_maps_are_not_converted(roads: Path, catalogs: None, cfg: CfgNode) -> None:
    for path in roads.glob("labels/*/1.png"):
        Image.fromarray(np.where(LABELS == 7, 255, LABELS).astype(np.uint8)).save(path)
    labels_of(cfg, entry(roads))
    assert DatasetCatalog.get("roads")[0]["sem_seg_file_name"] == f"{roads}/labels/a/1.png"


def test_zero_is_unlabelled(roads: Path, catalogs: None, cfg: CfgNode) -> None:
    (roads / "only.txt").write_text("b/1\n")
    (labels,) = labels_of(cfg, entry(roads, "zero_unlabelled", "7", f"{roads}/only.txt"))
    assert np.array_equal(labels, np.select([LABELS == 1, LABELS == 2], [0, 1], 255))
    shifted = Image.fromarray(np.where(LABELS == 7, 0, LABELS + 1).astype(np.uint8))
    shifted.save(roads / "labels/b/1.png")  # converted again
    (labels,) = labels_of(cfg, entry(roads, "zero_unlabelled", f"{roads}/only.txt"))
    assert np.array_equal(labels, np.where(LABELS == 7, 255, LABELS))


def test_colours(roads: Path, catalogs: None, cfg: CfgNode) -> None:
    colours = {0: (255, 0, 0), 1: (0, 255, 0), 2: (9, 9, 9), 7: (0, 0, 255)}
    picture = np.zeros((*LABELS.shape, 3), np.uint8)
    for value, colour in colours.items():
        picture[value == LABELS] = colour
    for path in roads.glob("labels/*/1.png"):
        Image.fromarray(picture).save(path)
    lines = {0: "road", 2: "nothing", 1: "sidewalk", 7: "green tree"}
    rows = [" ".join(map(str, (*colours[value], name))) for value, name in lines.items()]
    (roads / "classes.txt").write_text("\n".join(rows))
    for labels in labels_of(cfg, entry(roads, "nothing")):
        assert np.array_equal(labels, np.select([LABELS == 0, LABELS == 1, LABELS == 7], [0, 1, 2], 255))
    assert MetadataCatalog.get("roads").stuff_classes == ["road", "sidewalk", "green tree"]
    (roads / "classes.txt").write_text("\n".join(rows[:-1]))
    with pytest.raises(DataError, match=r"1\.png: 512 pixels have a colour that is not in the list"):
        labels_of(cfg, entry(roads))
    for labels in labels_of(cfg, entry(roads, "unknown_ignored")):
        assert np.array_equal(labels == 255, LABELS == 7)


def test_unknown_values_are_refused(roads: Path, catalogs: None, cfg: CfgNode) -> None:
    with pytest.raises(DataError, match="512 pixels have the values 7; expected 1 to 3 for the 3 classes"):
        labels_of(cfg, entry(roads, "zero_unlabelled"))
    with pytest.raises(ValueError, match="unknown option 'zero'"):
        labels_of(cfg, entry(roads, "zero"))


def test_what_is_refused(roads: Path, catalogs: None, cfg: CfgNode) -> None:
    for text, message in (
        ("roads:images:labels", "is not of the form name:image_folder:label_folder:classes"),
        (entry(roads / "none"), f"no image folder {roads}/none/images"),
        (entry(roads).replace("classes.txt", "names.txt"), "no file of class names"),
        (entry(roads, "void"), "unknown option 'void'; expected the ignored value"),
    ):
        cfg.DATASETS.LABEL_MAPS = [text]
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            register_from_config(cfg)
    cfg.DATASETS.LABEL_MAPS = [entry(roads)]
    register_from_config(cfg)
    (roads / "images/b/1.png").unlink()
    with pytest.raises(DataError, match="1 of 2 label maps have no image"):
        DatasetCatalog.get("roads")
    (roads / "images/a/1.bmp").write_bytes(b"")
    with pytest.raises(DataError, match="have the same name"):
        DatasetCatalog.get("roads")
