"""The world on disk: exact annotations in every layout, the same bytes however they were made."""

import json
import multiprocessing
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
import pytest
from PIL import Image

from clipdense.data.shapes import make
from clipdense.data.shapes.captions import SYNONYMS
from clipdense.data.shapes.layouts import (
    class_synonyms,
    coco_instances,
    coco_panoptic,
    lvis_instances,
    novel_kind,
)
from clipdense.data.shapes.make import annotation_file, ensure_shapes
from clipdense.data.shapes.records import IGNORE, draw_scene, file_name, scene_record
from clipdense.data.shapes.sheet import draw_sheet
from clipdense.data.shapes.splits import FREQUENCY, LVIS_COUNTS, MINI, SPLITS
from clipdense.data.shapes.world import BASE, CLASSES, COLORS, GROUNDS, NOVEL, SHAPES, Scene

COUNT = 8


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shapes")
    for split in ("train", "lvis_train"):
        ensure_shapes(split, COUNT, folder, workers=1, progress=False)
    return folder


def content(root: Path, kind: str, split: str = "train") -> dict[str, Any]:
    return json.loads(annotation_file(root, kind, split, COUNT).read_text())


def pixels(root: Path, folder: str, index: int) -> np.ndarray:
    return np.asarray(Image.open(root / folder / file_name(index)))


def scenes(split: str = "train") -> Iterator[tuple[int, Scene]]:
    return ((i, draw_scene(split, i)) for i in range(COUNT))


def tree(root: Path) -> dict[str, bytes]:
    """Every file but locks, by path."""
    files = [p for p in root.rglob("*") if p.is_file() and p.suffix != ".lock"]
    return {str(p.relative_to(root)): p.read_bytes() for p in files}


def test_images_are_the_scenes(root):
    for index, scene in scenes():
        assert np.array_equal(pixels(root, "train", index), scene.image)


def test_instances(root):
    closed = content(root, "instances_closed")
    assert [c["name"] for c in closed["categories"]] == list(CLASSES)
    assert [c["id"] for c in closed["categories"]] == list(range(1, 81))
    assert len({a["id"] for a in closed["annotations"]}) == len(closed["annotations"]) and min(
        a["id"] for a in closed["annotations"]
    )
    for index, scene in scenes():
        own = [a for a in closed["annotations"] if a["image_id"] == index]
        assert [a["category_id"] - 1 for a in own] == [t.category for t in scene.things]
        for annotation, thing in zip(own, scene.things, strict=True):
            x0, y0, x1, y1 = thing.box
            assert np.array_equal(mask_util.decode(annotation["segmentation"]), thing.mask)
            assert annotation["bbox"] == [x0, y0, x1 - x0, y1 - y0]
            assert annotation["area"] == thing.mask.sum() and annotation["iscrowd"] == 0
            assert annotation["visible"] == pytest.approx(thing.visible, abs=1e-4)


def test_panoptic_agrees_with_instances_and_semantics(root):
    panoptic = content(root, "panoptic_closed")
    assert [c["name"] for c in panoptic["categories"]] == [*CLASSES, *GROUNDS]
    assert [c["isthing"] for c in panoptic["categories"]] == [1] * 80 + [0] * 8
    for annotation, (index, scene) in zip(panoptic["annotations"], scenes(), strict=True):
        png = pixels(root, "panoptic_train", index).astype(int)
        ids = png[..., 0] + 256 * png[..., 1] + 65536 * png[..., 2]
        semantic = pixels(root, "semantic_train", index)
        segments = annotation["segments_info"]
        assert set(np.unique(ids)) == {s["id"] for s in segments}  # no pixel is void
        for segment in segments:
            mask = ids == segment["id"]
            assert segment["area"] == mask.sum() and (semantic[mask] == segment["category_id"] - 1).all()
            ys, xs = np.nonzero(mask)
            assert segment["bbox"] == [xs.min(), ys.min(), np.ptp(xs) + 1, np.ptp(ys) + 1]
        for number, thing in enumerate(scene.things, start=1):
            assert np.array_equal(ids == number, thing.mask)
        covered = np.any([t.mask for t in scene.things], axis=0)
        assert np.array_equal(semantic[~covered], scene.ground[~covered] + 80)


def test_captions(root):
    captions = content(root, "captions")
    assert len(captions["annotations"]) == 5 * COUNT == len({a["id"] for a in captions["annotations"]})
    words = {w for names in SYNONYMS.values() for name in names for w in name.split()}
    assert all(set(a["caption"].replace(",", "").split()) & words for a in captions["annotations"])


def test_base_class_files_never_show_a_novel_thing(root):
    instances, panoptic = content(root, "instances_ov"), content(root, "panoptic_ov")
    assert [c["id"] - 1 for c in instances["categories"]] == list(BASE)
    assert {a["category_id"] - 1 for a in instances["annotations"]} <= set(BASE)
    segments = [s["category_id"] - 1 for a in panoptic["annotations"] for s in a["segments_info"]]
    assert set(segments) <= {*BASE, *range(80, 88)} and max(segments) >= 80
    closed = {a["id"]: a for a in content(root, "instances_closed")["annotations"]}
    assert all(closed[a["id"]] == a for a in instances["annotations"])
    assert len(instances["annotations"]) == sum(a["category_id"] - 1 in BASE for a in closed.values())
    base_ids = [*BASE, *range(80, 88)]
    for index, _ in scenes():
        semantic, labels = pixels(root, "semantic_train", index), pixels(root, "semantic_ov_train", index)
        novel = np.isin(semantic, list(NOVEL))
        assert (labels[novel] == IGNORE).all()
        assert np.array_equal(np.array(base_ids)[labels[~novel]], semantic[~novel])


def test_an_image_of_novel_things_alone_is_no_training_image():
    scene = draw_scene("train", 0)
    record = scene_record(scene, "train", 0)
    novel, base = sorted(NOVEL)[0], BASE[0]
    for thing in record["things"]:
        thing["category"] = novel
    mixed = record | {"id": 1, "things": [record["things"][0], record["things"][1] | {"category": base}]}
    empty = record | {"id": 2, "things": []}
    for layout in (coco_instances, coco_panoptic):
        assert [i["id"] for i in layout([record, mixed, empty], BASE)["images"]] == [1]
        assert [i["id"] for i in layout([record, mixed, empty])["images"]] == [0, 1, 2]


def test_novel_classes():
    kinds = [novel_kind(k) for k in range(80)]
    assert {k for k in range(80) if kinds[k]} == NOVEL and len(BASE) == 60
    assert kinds.count("novel_shape") == 16 and kinds.count("novel_combination") == 4
    for k in NOVEL:  # a novel combination has parts that base classes have, a novel shape has not
        shapes = {b % len(SHAPES) for b in BASE}
        assert (k % len(SHAPES) in shapes) == (kinds[k] == "novel_combination")
        assert k // len(SHAPES) in {b // len(SHAPES) for b in BASE}


def test_synonyms_belong_to_one_class():
    names = [name for k in range(80) for name in class_synonyms(k)]
    assert len(set(names)) == len(names)
    assert [class_synonyms(k)[0] for k in range(80)] == list(CLASSES)
    assert "crimson disc" in class_synonyms(CLASSES.index("red circle"))


class TestLVIS:
    def test_groups_follow_lviss_rule(self):
        for count, group in zip(LVIS_COUNTS, FREQUENCY, strict=True):
            assert group == ("r" if count <= 10 else "c" if count <= 100 else "f")
        assert [FREQUENCY.count(group) for group in "rcf"] == [17, 31, 32]
        for group in "rcf":  # every colour and nearly every shape on each part of the tail
            members = [k for k in range(80) if FREQUENCY[k] == group]
            assert len({k // len(SHAPES) for k in members}) >= len(COLORS) - 1
            assert len({k % len(SHAPES) for k in members}) >= len(SHAPES) - 2

    @pytest.mark.slow
    def test_what_is_drawn_follows_the_rule_too(self):
        """Every class occurs among the 3,000 training images, and its count lies in its group."""
        counts = np.zeros(len(CLASSES), int)
        for index in range(SPLITS["lvis_train"].images):
            counts[sorted({t.category for t in draw_scene("lvis_train", index).things})] += 1
        groups = ["r" if n <= 10 else "c" if n <= 100 else "f" for n in counts]
        assert counts.min() >= 1 and groups == list(FREQUENCY)

    def test_lists(self, root):
        lvis = content(root, "lvis", "lvis_train")
        assert [c["frequency"] for c in lvis["categories"]] == list(FREQUENCY)
        for c in lvis["categories"]:
            assert c["name"] == CLASSES[c["id"] - 1] and c["synonyms"][0] == c["name"]
        for image, (index, scene) in zip(lvis["images"], scenes("lvis_train"), strict=True):
            shown = [t.category + 1 for t in scene.things]
            labelled = [a["category_id"] for a in lvis["annotations"] if a["image_id"] == index]
            assert not set(image["neg_category_ids"]) & set(shown) and len(image["neg_category_ids"]) == 8
            assert set(image["not_exhaustive_category_ids"]) <= set(labelled) <= set(shown)
            for category in set(labelled):
                missing = shown.count(category) - labelled.count(category)
                assert missing == (category in image["not_exhaustive_category_ids"])
            folder, name = image["coco_url"].split("/")[-2:]
            assert (root / folder / name).is_file()

    def test_federated_shares(self):
        """Over many records: a tenth of common classes left out, never a rare one; counts as in the file."""
        rare, common = FREQUENCY.index("r"), FREQUENCY.index("f")
        base = scene_record(draw_scene("lvis_train", 0), "lvis_train", 0)
        thing = base["things"][0]
        things = [thing | {"category": k} for k in (rare, common, common)]
        lvis = lvis_instances([base | {"id": i, "things": things} for i in range(1000)], "lvis_train")
        images = {
            k: {a["image_id"] for a in lvis["annotations"] if a["category_id"] == k + 1} for k in range(80)
        }
        assert len(images[rare]) == 1000 and 860 < len(images[common]) < 940
        partial = sum(bool(i["not_exhaustive_category_ids"]) for i in lvis["images"])
        assert 180 < partial < 270
        for k, c in enumerate(lvis["categories"]):
            assert c["image_count"] == len(images[k])
            assert c["instance_count"] == sum(a["category_id"] == k + 1 for a in lvis["annotations"])
        negative = np.bincount([k for i in lvis["images"] for k in i["neg_category_ids"]], minlength=81)
        assert negative[[rare + 1, common + 1]].sum() == 0 and negative[1:].max() < 170


def test_number_of_processes_changes_nothing(root, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(make, "_PART", 3)
    ensure_shapes("train", COUNT, tmp_path / "a", workers=2, progress=False)
    made = {k: v for k, v in tree(tmp_path / "a").items() if not k.startswith("parts")}
    assert made and all(tree(root)[name] == data for name, data in made.items())


def test_splits_share_no_scene():
    assert len({split.seed for split in SPLITS.values()}) == len(SPLITS)
    assert not np.array_equal(draw_scene("train", 0).image, draw_scene("val", 0).image)
    assert (SPLITS["train"].images, SPLITS["val"].images, SPLITS["clip_train"].images) == (3000, 500, 9000)
    assert MINI["train"] < SPLITS["train"].images and MINI["val"] < SPLITS["val"].images


def test_a_killed_run_goes_on_and_nothing_differs(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(make, "_PART", 2)
    run = multiprocessing.get_context("fork").Process(
        target=ensure_shapes,
        args=("val", 200, tmp_path / "killed"),
        kwargs={"workers": 1, "progress": False},
        daemon=True,
    )
    run.start()
    while not (tmp_path / "killed/parts/val/000002.json").exists():
        assert run.is_alive(), "the run ended before it could be killed"
        time.sleep(0.002)
    run.kill()
    run.join()
    assert not annotation_file(tmp_path / "killed", "captions", "val", 200).exists()
    written = {p: p.stat().st_mtime_ns for p in (tmp_path / "killed/val").iterdir()}
    for folder in ("killed", "whole"):
        ensure_shapes("val", 8, tmp_path / folder, workers=1, progress=False)
    killed, whole = tree(tmp_path / "killed"), tree(tmp_path / "whole")
    assert all(killed[name] == data for name, data in whole.items())
    first = tmp_path / "killed/val" / file_name(0)
    assert first.stat().st_mtime_ns == written[first], "finished images were drawn again"


def test_files_of_another_world_are_made_again(tmp_path: Path, monkeypatch):
    ensure_shapes("val", 2, tmp_path, workers=1, progress=False)
    good = tree(tmp_path)
    for name in ("parts/val/000000.json", "parts/val/2.done"):
        path = tmp_path / name
        path.write_text(path.read_text().replace(make._fingerprint(), "0123456789abcdef"))
    (tmp_path / "val" / file_name(0)).write_bytes(b"old")
    ensure_shapes("val", 2, tmp_path, workers=1, progress=False)
    assert tree(tmp_path) == good


def test_what_is_there_is_not_made_again(root, monkeypatch):
    monkeypatch.setattr(make, "write_scene", lambda *args: pytest.fail("drew a scene again"))
    ensure_shapes("train", COUNT, root, workers=1, progress=False)
    monkeypatch.setattr(make, "_write_annotations", lambda *args: pytest.fail("wrote annotations again"))
    assert ensure_shapes("train", COUNT, root, workers=1, progress=False) == root


def test_several_at_once_make_it_once(tmp_path: Path, monkeypatch):
    drawn: list[int] = []
    draw = make.write_scene
    monkeypatch.setattr(make, "write_scene", lambda root, split, i: drawn.append(i) or draw(root, split, i))
    with ThreadPoolExecutor(3) as pool:
        jobs = [pool.submit(ensure_shapes, "val", 3, tmp_path, workers=1, progress=False) for _ in range(3)]
        assert all(job.result() == tmp_path for job in jobs)
    assert sorted(drawn) == [0, 1, 2]


def test_more_images_later(tmp_path: Path):
    ensure_shapes("val", 2, tmp_path, workers=1, progress=False)
    ensure_shapes("val", 3, tmp_path, workers=1, progress=False)
    few, more = (json.loads(annotation_file(tmp_path, "captions", "val", n).read_text()) for n in (2, 3))
    assert few["annotations"] == more["annotations"][:10] and len(more["images"]) == 3


def test_bad_requests(tmp_path: Path):
    with pytest.raises(ValueError, match="no split 'test'.*train, val"):
        ensure_shapes("test", 1, tmp_path)
    with pytest.raises(ValueError, match="images is 0, expected at least 1"):
        ensure_shapes("val", 0, tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        ensure_shapes("val", 1, tmp_path / "file")


def test_folder(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("CLIPDENSE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("DETECTRON2_DATASETS", raising=False)
    assert make.shapes_root() == tmp_path / "cache" / "shapes"
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    assert make.shapes_root() == tmp_path / "shapes"
    monkeypatch.setattr(make.os, "access", lambda path, mode: False)  # a read-only data folder
    assert make.shapes_root() == tmp_path / "cache" / "shapes"
    (tmp_path / "shapes").mkdir()  # ... that holds the world already
    assert make.shapes_root() == tmp_path / "shapes"
    monkeypatch.delenv("DETECTRON2_DATASETS")
    monkeypatch.delenv("CLIPDENSE_CACHE")
    assert make.shapes_root().name == "shapes"


def test_sheet(root, tmp_path: Path):
    draw_sheet(root, "train", tmp_path / "new" / "sheet.png", images=COUNT, count=5, columns=3)
    sheet = Image.open(tmp_path / "new" / "sheet.png")
    assert sheet.width > 3 * 256 and sheet.height > 2 * 256
    first = np.asarray(sheet)[8 : 8 + 256, 8 : 8 + 256].astype(int)
    changed = np.abs(first - draw_scene("train", 0).image).max(-1) > 8
    assert 0.01 < changed.mean() < 0.8  # drawn upon, and still the scene


def test_a_callers_signal_handler_does_not_keep_the_workers(tmp_path, run_python):
    source = """
import signal, sys
from clipdense.data.shapes.make import ensure_shapes
signal.alarm(120)  # the default action ends a process that hangs
signal.signal(signal.SIGTERM, lambda *_: None)
for turn in range(3):
    ensure_shapes("val", 60, f"{sys.argv[1]}/{turn}", workers=2, progress=False)
print("ended")
"""
    assert run_python(source, str(tmp_path)).strip() == "ended"
