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
    assert metadata.stuff_classes == ["road", "sidewalk", "green tree"] and metadata.ignore_label == 7
    records = DatasetCatalog.get("roads")
    assert [r["image_id"] for r in records] == ["a/1", "b/1"]
    for record in records:
        assert np.array_equal(read_labels(record["sem_seg_file_name"]), LABELS)
    cfg.SOLVER.IMS_PER_BATCH = 1
    sample = next(iter(build_train_loader(cfg)))[0]
    assert set(sample["sem_seg"].unique().tolist()) == {0, 1, 2, 7}
    build_evaluator(cfg, "roads", str(tmp_path / "out"))


def test_what_is_refused(roads: Path, catalogs: None, cfg: CfgNode) -> None:
    for text, message in (
        ("roads:images:labels", "is not of the form name:image_folder:label_folder:classes"),
        (entry(roads / "none"), f"no image folder {roads}/none/images"),
        (entry(roads).replace("classes.txt", "names.txt"), "no file of class names"),
        (entry(roads, "void"), "'void'; expected a number"),
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
