"""OV-COCO and OV-LVIS: class lists, the scripts that make their files, and the datasets read from them."""

import json
import runpy
from pathlib import Path
from typing import Any

import pytest

from clipdense.clip.vocabulary import Vocabulary
from clipdense.data.datasets.layouts import load_lvis
from clipdense.data.datasets.open_vocabulary import (
    LVIS_RARE,
    OV_COCO,
    OV_COCO_BASE,
    OV_COCO_NOVEL,
    OV_LVIS_FILES,
    register_open_vocabulary,
)
from clipdense.data.loader import build_test_loader, build_train_loader
from clipdense.data.preparation.categories import select_categories

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.lvis_v1_categories import LVIS_CATEGORIES

SCRIPTS = Path(__file__).parents[2] / "datasets"
SETS = ["ovcoco_2017_train", "ovcoco_2017_train_65", "ovcoco_2017_val"]
SETS += ["ovlvis_v1_train", "ovlvis_v1_train_1203", "ovlvis_v1_val"]


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def register(root: Path) -> None:
    """Register the datasets again, below another folder."""
    for name in SETS:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    register_open_vocabulary(root)


def prepare(script: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = SCRIPTS / f"prepare_{script}.py"
    monkeypatch.setattr("sys.argv", [str(path), "--root", str(root)])
    runpy.run_path(str(path), run_name="__main__")


@pytest.fixture
def coco(data_dir: Path, tmp_path: Path) -> Path:
    """A root with the COCO sample's originals."""
    folder = tmp_path / "coco"
    (folder / "annotations").mkdir(parents=True)
    for split in ("train2017", "val2017"):
        (folder / split).symlink_to(data_dir / "coco" / split)
        name = f"annotations/instances_{split}.json"
        (folder / name).symlink_to(data_dir / "coco" / name)
    return tmp_path


@pytest.fixture
def lvis(tmp_path: Path) -> Path:
    """A root with LVIS v1's categories and two images: of a rare class, and of a rare and a frequent one."""
    (tmp_path / "lvis").mkdir()
    rare, frequent = min(LVIS_RARE), 3  # applesauce, airplane
    shared = {"area": 16, "segmentation": [[1, 1, 5, 1, 5, 5]], "bbox": [1, 1, 4, 4]}
    labels = [(1, rare), (2, rare), (2, frequent)]
    image = {"height": 8, "width": 8, "neg_category_ids": [rare, 7], "not_exhaustive_category_ids": []}
    content = {
        "categories": LVIS_CATEGORIES,
        "images": [{"id": i, "coco_url": f"http://a/train2017/{i}.jpg", **image} for i in (1, 2)],
        "annotations": [
            {"id": k, "image_id": i, "category_id": c} | shared for k, (i, c) in enumerate(labels)
        ],
    }
    for split in ("train", "val"):
        (tmp_path / "lvis" / f"lvis_v1_{split}.json").write_text(json.dumps(content))
    return tmp_path


# ---- class lists


def test_coco_classes(data_dir: Path) -> None:
    lists = data_dir / "class_lists"
    assert read(lists / "clipself_mscoco_seen_classes.json") == OV_COCO_BASE and len(OV_COCO_BASE) == 48
    assert read(lists / "clipself_mscoco_unseen_classes.json") == OV_COCO_NOVEL and len(OV_COCO_NOVEL) == 17
    assert read(lists / "clipself_mscoco_65_classes.json") == list(OV_COCO.values())
    assert list(OV_COCO) == sorted(OV_COCO)
    counts = {name: len(MetadataCatalog.get(name).thing_classes) for name in SETS[:3]}
    assert list(counts.values()) == [48, 65, 65]


def test_lvis_classes(data_dir: Path) -> None:
    lists = data_dir / "class_lists"
    train, wide, val = map(MetadataCatalog.get, SETS[3:])
    assert read(lists / "clipself_lvis_v1_seen_classes.json") == train.thing_classes
    assert len(train.thing_classes) == 866 and train.novel_classes == []
    for metadata in (wide, val):
        assert read(lists / "clipself_lvis_v1_all_classes.json") == metadata.thing_classes
        assert read(lists / "clipself_lvis_v1_unseen_classes.json") == metadata.novel_classes
    assert len(val.novel_classes) == 337


@pytest.mark.parametrize("name", SETS)
def test_vocabularies(name: str) -> None:
    base, rest = (866, 337) if "lvis" in name else (48, 17)
    novel = 0 if name.endswith("train") else rest
    metadata = MetadataCatalog.get(name)
    vocabulary = Vocabulary.from_metadata(metadata)
    assert vocabulary.names == tuple(metadata.thing_classes)
    assert vocabulary.base is not None
    assert (sum(vocabulary.base), len(vocabulary) - sum(vocabulary.base)) == (base, novel)
    assert list(metadata.thing_dataset_id_to_contiguous_id.values()) == list(range(base + novel))
    if "lvis" in name:  # a name that its own synonyms lack leads them
        assert vocabulary.synonyms[vocabulary.index("bull")] == ("bull", "horned_cow")


# ---- files


def test_the_coco_samples_files(coco: Path, data_dir: Path, monkeypatch, capsys) -> None:
    """Annotations and categories as the sample's OV-COCO files have them; of the images those that show a
    class, which the sample keeps all."""
    prepare("ov_coco", coco, monkeypatch)
    assert capsys.readouterr().out.count(" images, ") == 3
    made, given = coco / "coco" / "annotations", data_dir / "coco" / "annotations"
    for file, sample, images in (
        ("instances_train2017_seen_2", "ovcoco_instances_train2017_seen48", 317),
        ("instances_train2017_seen_2_65_cat", "ovcoco_instances_train2017_seen48", 317),
        ("instances_val2017_all_2", "ovcoco_instances_val2017_all65", 298),
    ):
        ours, expected = read(made / f"{file}.json"), read(given / f"{sample}.json")
        assert ours["annotations"] == expected["annotations"]
        shown = {a["image_id"] for a in expected["annotations"]}
        assert ours["images"] == [i for i in expected["images"] if i["id"] in shown]
        assert len(ours["images"]) == images
        if not file.endswith("65_cat"):
            assert ours["categories"] == expected["categories"]
    wide = read(made / "instances_train2017_seen_2_65_cat.json")
    assert {c["id"]: c["name"] for c in wide["categories"]} == OV_COCO
    # what is there is not made again
    target = made / "instances_val2017_all_2.json"
    target.write_text("{}")
    prepare("ov_coco", coco, monkeypatch)
    assert target.read_text() == "{}" and capsys.readouterr().out.count("exists already") == 3


def test_coco_data_sets(coco: Path, cfg, catalogs, monkeypatch) -> None:
    prepare("ov_coco", coco, monkeypatch)
    register(coco)
    names = {name: MetadataCatalog.get(name).thing_classes for name in SETS[:3]}
    labels = {
        name: [classes[a["category_id"]] for d in DatasetCatalog.get(name) for a in d["annotations"]]
        for name, classes in names.items()
    }
    train, wide, val = labels.values()
    assert train == wide and set(train) <= set(OV_COCO_BASE) and len(train) == 2195
    assert sum(name in OV_COCO_NOVEL for name in val) == 341 and len(val) == 2271
    cfg.DATASETS.TRAIN = (SETS[0],)
    assert all(len(sample["instances"]) for sample in next(iter(build_train_loader(cfg))))
    assert "image" in next(iter(build_test_loader(cfg, SETS[2])))[0]
    # either training file serves both
    (coco / "coco/annotations/instances_train2017_seen_2.json").unlink()
    register(coco)
    assert MetadataCatalog.get(SETS[0]).json_file.endswith("_65_cat.json")
    first = [a["category_id"] for d in DatasetCatalog.get(SETS[0]) for a in d["annotations"]]
    assert [names[SETS[0]][k] for k in first] == train


@pytest.mark.parametrize("file", OV_LVIS_FILES)
def test_lvis_data_sets(lvis: Path, catalogs, monkeypatch, file: str) -> None:
    prepare("ov_lvis", lvis, monkeypatch)
    made = lvis / "lvis" / OV_LVIS_FILES[0]
    content = read(made)
    assert len(content["images"]) == 2 and len(content["categories"]) == 1203
    assert [a["category_id"] for a in content["annotations"]] == [3]
    made.rename(lvis / "lvis" / file)
    register(lvis)
    for name, novel in zip(SETS[3:], (0, 0, 2), strict=True):
        metadata, dicts = MetadataCatalog.get(name), DatasetCatalog.get(name)
        assert dicts[0]["file_name"] == str(lvis / "coco/train2017/1.jpg") and dicts[0]["neg_category_ids"]
        shown = [metadata.thing_classes[a["category_id"]] for d in dicts for a in d["annotations"]]
        assert shown.count("airplane") == 1 and shown.count("applesauce") == novel
        assert len(shown) == 1 + novel


def test_rare_classes_of_the_lvis_sample(data_dir: Path, tmp_path: Path) -> None:
    source = data_dir / "lvis" / "lvis_v0.5_val_100_images_available.json"
    content = read(source)
    common = {c["id"] for c in content["categories"] if c["frequency"] != "r"}
    counts = select_categories(source, tmp_path / "out.json", common, all_images=True)
    rare = sum(a["category_id"] not in common for a in content["annotations"])
    assert counts == (62, 660 - rare) and 0 < rare < 60
    dicts = load_lvis(tmp_path / "out.json", data_dir / "lvis")
    assert {a["category_id"] + 1 for d in dicts for a in d["annotations"]} <= common


def test_files_of_other_categories_are_refused(coco: Path, monkeypatch, capsys) -> None:
    source = coco / "coco" / "annotations" / "instances_val2017.json"
    content = read(source)
    source.unlink()
    content["categories"] = content["categories"][:-1]
    source.write_text(json.dumps(content))
    with pytest.raises(SystemExit):
        prepare("ov_coco", coco, monkeypatch)
    assert "instances_val2017.json: no categories [90]" in capsys.readouterr().err
    assert not source.with_name("instances_val2017_all_2.json").exists()
    source.unlink()
    with pytest.raises(SystemExit):
        prepare("ov_coco", coco, monkeypatch)
    assert "instances_val2017.json" in capsys.readouterr().err
