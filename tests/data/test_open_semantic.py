"""COCO-Stuff, ADE20K-full and PASCAL-Context: class lists, preparation from the published layouts, names
registered."""

import json
import pickle
import runpy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from clipdense.clip.vocabulary import Vocabulary
from clipdense.data.datasets.open_semantic import (
    ADE20K_FULL,
    COCO_STUFF,
    COCO_STUFF_BASE,
    COCO_STUFF_NOVEL,
    COCO_STUFF_VALUES,
    PASCAL_CONTEXT_59,
    PASCAL_CONTEXT_459,
    register_open_semantic,
)
from clipdense.data.image import read_labels
from clipdense.data.loader import build_test_loader, build_train_loader
from clipdense.data.preparation.ade20k import ade20k_full, read_object_names
from clipdense.data.preparation.categories import select_categories
from clipdense.data.preparation.labels import convert_labels, read_matlab_labels

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

Run = Callable[..., None]


@pytest.fixture
def prepare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a preparation script on ``tmp_path``."""

    def run(script: str, *words: str) -> None:
        path = Path(__file__).parents[2] / "datasets" / f"prepare_{script}.py"
        monkeypatch.setattr("sys.argv", [str(path), "--root", str(tmp_path), *words])
        runpy.run_path(str(path), run_name="__main__")

    return run


@pytest.fixture
def registered(tmp_path: Path, catalogs: None) -> None:
    DatasetCatalog.clear()
    MetadataCatalog.clear()
    register_open_semantic(tmp_path)


def save(array: np.ndarray, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def test_class_lists() -> None:
    lists = [COCO_STUFF, COCO_STUFF_BASE, ADE20K_FULL, PASCAL_CONTEXT_459, PASCAL_CONTEXT_59]
    assert [len(names) for names in lists] == [171, 156, 847, 459, 59]
    assert len(COCO_STUFF_NOVEL) == 15 and set(COCO_STUFF_NOVEL) < set(COCO_STUFF)
    assert set(PASCAL_CONTEXT_59) < set(PASCAL_CONTEXT_459)
    for names in lists:
        assert len(set(names)) == len(names) and all(name == name.strip() for name in names)
        assert len(Vocabulary.from_names(names, separator=None)) == len(names)
    for name in ("ade20k_full_sem_seg_val", "pascal_context_459_sem_seg_train"):
        metadata = MetadataCatalog.get(name)
        assert (metadata.evaluator_type, metadata.ignore_label) == ("sem_seg", 65535)
        assert name in DatasetCatalog.list()


def test_coco_stuff(prepare: Run, registered: None, tmp_path: Path, cfg: CfgNode) -> None:
    """Base classes count from 0 without gaps, novel ones are void in training."""
    names = ["person", "cow", "toothbrush", "banner", "tree", "wood"]
    values = [COCO_STUFF_VALUES[COCO_STUFF.index(name)] for name in names]
    raw = np.array([[*values, 255, 11]], np.uint8).repeat(40, 0).repeat(5, 1)
    for split in ("train2017", "val2017"):
        save(raw, tmp_path / "coco/stuffthingmaps" / split / "000000000009.png")
        save(np.zeros((40, 40, 3), np.uint8), tmp_path / "coco" / split / "000000000009.jpg")
    prepare("coco_stuff")
    for name, classes, novel in (
        ("coco_2017_train_stuff_sem_seg", COCO_STUFF, []),
        ("ovcoco_stuff_2017_train", COCO_STUFF_BASE, []),
        ("ovcoco_stuff_2017_val", COCO_STUFF, COCO_STUFF_NOVEL),
    ):
        (record,) = DatasetCatalog.get(name)
        found = read_labels(record["sem_seg_file_name"])[0, ::5]
        assert [classes[i] if i < 255 else "" for i in found] == [
            *(n if n in classes else "" for n in names),
            "",
            "",
        ]
        assert MetadataCatalog.get(name).get("novel_classes", []) == novel
    (record,) = DatasetCatalog.get("coco_object_sem_seg_val")
    objects = read_labels(record["sem_seg_file_name"])[0, ::5].tolist()
    assert objects == [1 + COCO_STUFF.index(n) if n in names[:3] else 0 for n in (*names, "", "")]
    classes = MetadataCatalog.get("coco_object_sem_seg_val").stuff_classes
    assert [classes[i] for i in objects[:4]] == [*names[:3], "background"]
    vocabulary = Vocabulary.from_metadata(MetadataCatalog.get("ovcoco_stuff_2017_val"))
    assert vocabulary.base is not None and sum(vocabulary.base) == 156
    cfg.DATASETS.TRAIN, cfg.SOLVER.IMS_PER_BATCH = ("ovcoco_stuff_2017_train",), 1
    sample = next(iter(build_train_loader(cfg)))[0]
    assert set(sample["sem_seg"].unique().tolist()) == {
        0,
        155,
        255,
        *map(COCO_STUFF_BASE.index, ("banner", "toothbrush")),
    }


def test_coco_stuff_ids_are_those_of_panoptic_coco(data_dir: Path, prepare: Run, tmp_path: Path) -> None:
    """Categories up to 182 are the same in both: real maps, written in COCO-Stuff's layout."""
    root = data_dir / "coco"
    content = json.loads((root / "annotations/panoptic_val2017.json").read_text())
    names = {c["id"]: c["name"] for c in content["categories"]}
    seen = set()
    for annotation in content["annotations"][:25]:
        ids = {s["id"]: s["category_id"] for s in annotation["segments_info"]}
        panoptic = read_labels(root / "panoptic_val2017" / annotation["file_name"])
        raw = np.full(panoptic.shape, 255, np.uint8)
        for segment, category in ids.items():
            if category <= 182:
                raw[panoptic == segment] = category - 1
        save(raw, tmp_path / "coco/stuffthingmaps/val2017" / annotation["file_name"])
    prepare("coco_stuff", "--split", "val2017")
    for path in (tmp_path / "coco/stuffthingmaps_detectron2/val2017").iterdir():
        labels, raw = read_labels(path), read_labels(tmp_path / "coco/stuffthingmaps/val2017" / path.name)
        assert np.array_equal(labels == 255, raw == 255)
        for value in np.unique(raw[raw != 255]):
            (label,) = np.unique(labels[raw == value])
            assert COCO_STUFF[label] == names[value + 1]
            seen.add(label)
    assert len(seen) > 50 and max(seen) > 150


def test_ade20k_full(prepare: Run, registered: None, tmp_path: Path, cfg: CfgNode) -> None:
    root = tmp_path / "ADE20K_2021_17_01"
    names = [f"object {i}" for i in range(300)]
    names += [*reversed(ADE20K_FULL)]  # numbers beyond 255: red counts
    root.mkdir()
    index = {"filename": ["x.jpg"], "objectcounts": np.zeros(3), "objectnames": names, "path": tmp_path}
    (root / "index_ade20k.pkl").write_bytes(pickle.dumps(index))
    number = np.array([[0, names.index("wall") + 1, 7, names.index("building, edifice") + 1]]).repeat(600, 0)
    number = number.repeat(200, 1)
    seg = np.stack([number // 256 * 10 + 3, number % 256, number * 0 + 9], -1).astype(np.uint8)
    for split, folder in (("training", "urban/street"), ("validation", "home/bedroom")):
        for stem, part in (("large", seg), ("small", seg[:30, 150:250])):
            path = root / "images/ADE" / split / folder / f"{stem}.jpg"
            save(part[..., ::-1], path)
            save(part, path.with_name(f"{stem}_seg.png"))
    prepare("ade20k_full")
    large, small = DatasetCatalog.get("ade20k_full_sem_seg_val")
    labels = read_labels(large["sem_seg_file_name"])
    assert labels.shape == (512, 683) and Image.open(large["file_name"]).size == (683, 512)
    assert [int(labels[9, x]) for x in (0, 250, 400, 600)] == [65535, 0, 65535, 1]
    assert set(np.unique(labels)) == {0, 1, 65535}
    source = root / "images/ADE/validation/home/bedroom/small.jpg"
    assert Path(small["file_name"]).read_bytes() == source.read_bytes()
    assert read_labels(small["sem_seg_file_name"])[0].tolist() == [65535] * 50 + [0] * 50
    cfg.DATASETS.TRAIN, cfg.SOLVER.IMS_PER_BATCH = ("ade20k_full_sem_seg_train",), 2
    samples = next(iter(build_train_loader(cfg)))
    assert {v for s in samples for v in s["sem_seg"].unique().tolist()} == {0, 1, 65535}
    assert ade20k_full(root, "training", {}, 65535) == 0  # made already


def test_ade20k_index_is_read_without_running_it(prepare: Run, tmp_path: Path) -> None:
    class Harmful:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return exec, (f"open({str(tmp_path / 'harm')!r}, 'w')",)

    path = tmp_path / "ADE20K_2021_17_01" / "index_ade20k.pkl"
    path.parent.mkdir()
    path.write_bytes(pickle.dumps({"objectnames": ["wall"], "x": [Harmful(), np.ones(2)]}))
    assert read_object_names(path) == ["wall"] and not (tmp_path / "harm").exists()
    with pytest.raises(SystemExit, match=r"lacks 846 of the 847 classes, first 'building, edifice' \(near: "):
        prepare("ade20k_full")
    path.write_bytes(pickle.dumps([1]))
    with pytest.raises(ValueError, match="not an index of ADE20K"):
        read_object_names(path)
    path.write_bytes(pickle.dumps({"objectnames": 3}))
    with pytest.raises(ValueError, match="not a list of names"):
        read_object_names(path)
    with pytest.raises(FileNotFoundError, match=r"no images .*ADE20K_2021_17_01\.zip"):
        ade20k_full(path.parent, "validation", {}, 65535)


def test_pascal_context(prepare: Run, registered: None, tmp_path: Path, cfg: CfgNode) -> None:
    """459 classes from 1, 0 is unlabelled; the 59 are those of the same names."""
    root = tmp_path / "VOC2010"
    raw = np.zeros((40, 60), np.uint16)
    raw[:, 20:40], raw[:, 40:] = 1 + PASCAL_CONTEXT_459.index("table"), 459
    (root / "trainval").mkdir(parents=True)
    (root / "ImageSets/Main").mkdir(parents=True)
    for split, stem in (("train", "2008_000002"), ("val", "2008_000003")):
        savemat(root / "trainval" / f"{stem}.mat", {"LabelMap": raw})
        (root / f"ImageSets/Main/{split}.txt").write_text(f"{stem}\n")
        save(np.zeros((40, 60, 3), np.uint8), root / "JPEGImages" / f"{stem}.jpg")
    prepare("pascal_context")
    table = PASCAL_CONTEXT_459.index("table")
    assert table == 396
    for name, want in (
        ("pascal_context_59_sem_seg_val", [255, PASCAL_CONTEXT_59.index("table"), 255]),
        ("pascal_context_60_sem_seg_val", [0, 1 + PASCAL_CONTEXT_59.index("table"), 0]),
        ("pascal_context_459_sem_seg_val", [65535, table, 458]),
    ):
        (record,) = DatasetCatalog.get(name)
        assert read_labels(record["sem_seg_file_name"])[0, ::20].tolist() == want
        assert record["image_id"] == "2008_000003"
        (batch,) = build_test_loader(cfg, name)
        assert batch[0]["height"] == 40
    lists = tmp_path / "lists"
    lists.mkdir()
    (lists / "few.txt").write_text("2008_000002\n")
    prepare("pascal_context", "--split", "few", "--lists", str(lists))
    assert [p.name for p in (root / "annotations_detectron2/pc459_few").iterdir()] == ["2008_000002.tif"]


def test_coco_stuff_10k(prepare: Run, registered: None, tmp_path: Path) -> None:
    """Category ids from 1, 0 is unlabelled."""
    root = tmp_path / "coco_stuff10k"
    names = ["person", "toothbrush", "banner", "wood"]
    ids = [1 + COCO_STUFF_VALUES[COCO_STUFF.index(name)] for name in names]
    for folder in ("annotations", "imageLists"):
        (root / folder).mkdir(parents=True)
    for split in ("train", "test"):
        savemat(root / f"annotations/{split}_1.mat", {"S": np.array([[0, *ids]], np.uint8)})
        (root / f"imageLists/{split}.txt").write_text(f"{split}_1\n")
        save(np.zeros((1, 5, 3), np.uint8), root / f"images/{split}_1.jpg")
    prepare("coco_stuff_10k")
    (record,) = DatasetCatalog.get("coco_stuff_10k_sem_seg_test")
    found = read_labels(record["sem_seg_file_name"])[0].tolist()
    assert found[0] == 255 and [COCO_STUFF[i] for i in found[1:]] == names
    assert Path(record["file_name"]).stem == "test_1"


def test_cityscapes(prepare: Run, tmp_path: Path) -> None:
    """Labels of the 19 classes, in the order of Detectron2's class names, beside the published ones."""
    classes = MetadataCatalog.get("cityscapes_fine_sem_seg_val").stuff_classes
    labels = tmp_path / "cityscapes/gtFine/val/ulm/ulm_000000_000019_gtFine_labelIds.png"
    save(np.array([[0, 7, 8, 23, 24, 29, 31, 33]], np.uint8), labels)
    prepare("cityscapes_sem_seg", "--split", "val")
    found = read_labels(labels.with_name("ulm_000000_000019_gtFine_labelTrainIds.png"))[0].tolist()
    named = ["", "road", "sidewalk", "sky", "person", "", "train", "bicycle"]
    assert [classes[i] if i < 255 else "" for i in found] == named
    with pytest.raises(SystemExit):
        prepare("cityscapes_sem_seg", "--split", "train")


def test_labels_and_files_that_are_wrong(tmp_path: Path) -> None:
    save(np.full((2, 2), 9, np.uint8), tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"a\.png: unknown label"):
        convert_labels(tmp_path, tmp_path / "out", np.arange(9).__getitem__)
    (tmp_path / "a.mat").write_bytes(b"x" * 200)
    with pytest.raises(ValueError, match=r"a\.mat: not a MATLAB file with a LabelMap"):
        read_matlab_labels(tmp_path / "a.mat")
    savemat(tmp_path / "b.mat", {"other": np.ones(2)})
    with pytest.raises(ValueError, match=r"b\.mat: not a MATLAB file with a LabelMap"):
        read_matlab_labels(tmp_path / "b.mat")
    with pytest.raises(FileNotFoundError, match=r"no label maps \(\*\.mat\)"):
        convert_labels(tmp_path / "out", tmp_path, lambda labels: labels, suffix=".mat")


@pytest.mark.parametrize("compressed", [False, True])
def test_damaged_matlab_files_are_named(tmp_path, compressed):
    savemat(tmp_path / "a.mat", {"LabelMap": np.arange(600).reshape(20, 30)}, do_compression=compressed)
    assert np.array_equal(read_matlab_labels(tmp_path / "a.mat"), np.arange(600).reshape(20, 30))
    data = (tmp_path / "a.mat").read_bytes()
    rng = np.random.default_rng(0)
    for share in (0.0, 0.3, 0.6, 0.95):
        (tmp_path / "cut.mat").write_bytes(data[: int(len(data) * share)])
        with pytest.raises(ValueError, match=r"cut\.mat: not a MATLAB file with a LabelMap"):
            read_matlab_labels(tmp_path / "cut.mat")
    for _ in range(40):
        damaged = bytearray(data)
        for place in rng.integers(0, min(300, len(data)), 4):
            damaged[place] = rng.integers(0, 256)
        (tmp_path / "bits.mat").write_bytes(damaged)
        try:
            assert read_matlab_labels(tmp_path / "bits.mat").ndim == 2
        except ValueError as error:
            assert "bits.mat" in str(error)
    savemat(tmp_path / "deep.mat", {"LabelMap": np.zeros((2, 3, 4))})
    with pytest.raises(ValueError, match=r"deep\.mat: not a MATLAB file with a LabelMap.*\(2, 3, 4\)"):
        read_matlab_labels(tmp_path / "deep.mat")


@pytest.mark.parametrize("content", ["[]", "{}", '{"images": [], "annotations": {}, "categories": []}'])
def test_selection_from_files_of_another_structure(tmp_path, content):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(ValueError, match=r"a\.json: no list of"):
        select_categories(tmp_path / "a.json", tmp_path / "b.json", [1])
