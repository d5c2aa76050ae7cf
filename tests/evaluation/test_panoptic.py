"""`PanopticEvaluator`: equal to panopticapi on real annotations, and correct where panopticapi fails."""

import contextlib
import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from clipdense.evaluation import PanopticEvaluator
from clipdense.evaluation.panoptic import Matches, panoptic_quality

from detectron2.data import MetadataCatalog

THINGS = {"thing_dataset_id_to_contiguous_id": {10: 0, 20: 1}}
STUFF = {"stuff_dataset_id_to_contiguous_id": {30: 0}}
CATEGORIES = [
    {"id": 10, "name": "cat", "isthing": 1},
    {"id": 20, "name": "dog", "isthing": 1},
    {"id": 30, "name": "sky", "isthing": 0},
]


def read(path: Path) -> np.ndarray:
    rgb = np.array(Image.open(path), dtype=np.int64)
    return rgb[..., 0] + 256 * rgb[..., 1] + 65536 * rgb[..., 2]


def write(path: Path, ids: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.stack([ids % 256, ids // 256 % 256, ids // 65536], -1).astype(np.uint8)).save(path)


def perturbed(ids: np.ndarray, segments: list[dict[str, Any]], classes: list[int], rng: Any) -> Any:
    """Shift a segmentation, and drop, split and misclassify segments; a few images become empty."""
    shifted, found, result = np.roll(ids, rng.integers(-5, 6, 2), (0, 1)), [], np.zeros_like(ids)
    for segment in segments if rng.random() < 0.95 else []:
        mask = shifted == segment["id"]
        if rng.random() < 0.1:
            continue
        label = segment["category_id"] if rng.random() < 0.85 else int(rng.choice(classes))
        halves = [mask & (np.arange(ids.shape[1]) % 100 < 50), mask] if rng.random() < 0.1 else [mask]
        for part in halves:
            result[part] = len(found) + 1
            found.append({"id": len(found) + 1, "category_id": label})
    return result, found


def test_equals_panopticapi_on_real_annotations(data_dir: Path, register: Any, tmp_path: Path) -> None:
    masks = data_dir / "coco" / "panoptic_val2017"
    content = json.loads((data_dir / "coco" / "annotations" / "panoptic_val2017.json").read_text())
    content["annotations"] = content["annotations"][::4]
    gt_json = tmp_path / "panoptic.json"
    gt_json.write_text(json.dumps(content))
    classes = [c["id"] for c in content["categories"]]
    things = {c["id"] for c in content["categories"] if c["isthing"]}
    contiguous = {c: i for i, c in enumerate(classes)}
    name = register(
        panoptic_json=str(gt_json),
        panoptic_root=str(masks),
        thing_dataset_id_to_contiguous_id={c: i for c, i in contiguous.items() if c in things},
        stuff_dataset_id_to_contiguous_id=contiguous,
    )
    rng = np.random.default_rng(0)
    samples, outputs = [], []
    for annotation in content["annotations"]:
        ids = read(masks / annotation["file_name"])
        ids, segments = perturbed(ids, annotation["segments_info"], classes, rng)
        for segment in segments:
            segment["isthing"] = segment["category_id"] in things
            segment["category_id"] = contiguous[segment["category_id"]]
        samples.append({"image_id": annotation["image_id"]})
        outputs.append({"panoptic_seg": (torch.from_numpy(ids), segments)})
    results = {}
    for backend in ("hotcoco", "reference"):
        evaluator = PanopticEvaluator(name, str(tmp_path / backend), backend=backend, per_class=True)
        evaluator.reset()
        evaluator.process(samples, outputs)
        results[backend] = evaluator.evaluate()["panoptic_seg"]
    assert results["hotcoco"] == pytest.approx(results["reference"], rel=0, abs=1e-9, nan_ok=True)

    # and as panopticapi's own users call it, on the files that were written
    from panopticapi.evaluation import pq_compute

    with contextlib.redirect_stdout(io.StringIO()):
        predictions = str(tmp_path / "hotcoco" / "panoptic_predictions.json")
        folder = str(tmp_path / "hotcoco" / "panoptic")
        theirs = pq_compute(str(gt_json), predictions, str(masks), folder)
    for suffix, group in (("", "All"), ("_th", "Things"), ("_st", "Stuff")):
        for metric in ("PQ", "SQ", "RQ"):
            ours = results["hotcoco"][metric + suffix]
            assert ours == pytest.approx(100 * theirs[group][metric.lower()], rel=0, abs=1e-9)
            assert 1 < ours < 99
    named = {c["id"]: results["hotcoco"][f"PQ-{c['name']}"] for c in content["categories"]}
    for category, quality in theirs["per_class"].items():
        assert math.isnan(named[category]) or named[category] == pytest.approx(100 * quality["pq"], abs=1e-9)


@pytest.fixture
def two_images(register: Any, tmp_path: Path) -> str:
    """10 x 10 images: the first is half cat, half sky; the second all dog."""
    first, second = np.full((10, 10), 1), np.full((10, 10), 1)
    first[:, 5:] = 300
    write(tmp_path / "gt" / "a" / "1.png", first)
    write(tmp_path / "gt" / "2.png", second)
    segments = [[(1, 10, 50), (300, 30, 50)], [(1, 20, 100)]]
    annotations = [
        {
            "image_id": i,
            "file_name": name,
            "segments_info": [{"id": s, "category_id": c, "area": a, "iscrowd": 0} for s, c, a in rows],
        }
        for i, name, rows in zip((1, 2), ("a/1.png", "2.png"), segments, strict=True)
    ]
    images = [{"id": i, "height": 10, "width": 10} for i in (1, 2)]
    path = tmp_path / "panoptic.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": CATEGORIES}))
    files = {"panoptic_json": str(path), "panoptic_root": str(tmp_path / "gt"), "label_divisor": 1000}
    return str(register(**files, **THINGS, **STUFF, novel_classes=["dog"]))


@pytest.mark.parametrize("backend", ["hotcoco", "reference"])
def test_by_hand(two_images: str, backend: str) -> None:
    evaluator = PanopticEvaluator(two_images, backend=backend, per_class=True)
    evaluator.reset()
    ids = torch.ones(10, 10, dtype=torch.int32)
    ids[:, 6:] = 2
    segments = [
        {"id": 1, "isthing": True, "category_id": 0},
        {"id": 2, "isthing": False, "category_id": 0},
        {"id": 3, "isthing": True, "category_id": 1},  # lost all its pixels to others: it is left out
    ]
    evaluator.process([{"image_id": 1}], [{"panoptic_seg": (ids, segments)}])
    got = evaluator.evaluate()["panoptic_seg"]  # image 2 was not predicted: its dog is missed
    assert got["PQ-cat"] == pytest.approx(100 * 50 / 60) and got["PQ-sky"] == pytest.approx(100 * 40 / 50)
    assert got["PQ-dog"] == got["PQ_novel"] == 0
    assert got["PQ_th"] == pytest.approx(100 * 50 / 60 / 2) and got["RQ_th"] == pytest.approx(50)
    assert got["PQ_base"] == pytest.approx((got["PQ-cat"] + got["PQ-sky"]) / 2)
    assert got["PQ"] == pytest.approx((got["PQ-cat"] + got["PQ-sky"]) / 3)


def test_pixels_encode_class_and_instance(two_images: str) -> None:
    metadata = MetadataCatalog.get(two_images)
    del metadata.stuff_dataset_id_to_contiguous_id
    metadata.stuff_dataset_id_to_contiguous_id = {30: 5}  # contiguous ids that are not those of things
    evaluator = PanopticEvaluator(two_images, per_class=True)
    evaluator.reset()
    ids = torch.full((10, 10), 5000)
    ids[:, :5] = 3
    ids[0] = -1
    evaluator.process([{"image_id": 1}], [{"panoptic_seg": (ids, None)}])
    got = evaluator.evaluate()["panoptic_seg"]
    assert got["PQ-cat"] == pytest.approx(90) and got["PQ-sky"] == pytest.approx(90)


def test_nothing_predicted(two_images: str, tmp_path: Path) -> None:
    evaluator = PanopticEvaluator(two_images, str(tmp_path / "out"))
    evaluator.reset()
    got = evaluator.evaluate()["panoptic_seg"]
    assert got["PQ"] == got["SQ"] == got["PQ_st"] == 0
    saved = json.loads((tmp_path / "out" / "panoptic_predictions.json").read_text())
    assert [a["segments_info"] for a in saved["annotations"]] == [[], []]
    assert (tmp_path / "out" / "panoptic" / "a" / "1.png").is_file()
    assert math.isnan(panoptic_quality([Matches()])[0])


def test_errors_name_the_cause(two_images: str) -> None:
    evaluator = PanopticEvaluator(two_images)
    ids = torch.ones(10, 10, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"image 1: the map has segments \[1\] that segments_info lacks"):
        evaluator.process([{"image_id": 1}], [{"panoptic_seg": (ids, [])}])
    with pytest.raises(ValueError, match="predicts thing class 7"):
        evaluator.process(
            [{"image_id": 1}], [{"panoptic_seg": (ids, [{"id": 1, "isthing": True, "category_id": 7}])}]
        )
    with pytest.raises(ValueError, match="image 9 is not in the panoptic annotations"):
        evaluator.process([{"image_id": 9}], [{"panoptic_seg": (ids, [])}])
    with pytest.raises(ValueError, match="METRIC_BACKEND is 'x'"):
        PanopticEvaluator(two_images, backend="x")


@pytest.fixture(params=["hotcoco", "reference"])
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def change(name: str, edit: Any) -> None:
    """Edit the annotation file of a registered dataset."""
    path = Path(MetadataCatalog.get(name).panoptic_json)
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def evaluate(
    name: str, ids: torch.Tensor, segments: Any, image_id: Any = 1, **options: Any
) -> dict[str, float]:
    evaluator = PanopticEvaluator(name, per_class=True, distributed=False, **options)
    evaluator.process([{"image_id": image_id}], [{"panoptic_seg": (ids, segments)}])
    result: dict[str, float] = evaluator.evaluate()["panoptic_seg"]
    return result


IDS = torch.ones(10, 10, dtype=torch.int64)
IDS[:, 6:] = 2
SEGMENTS = [{"id": 1, "isthing": True, "category_id": 0}, {"id": 2, "isthing": False, "category_id": 0}]


@pytest.mark.parametrize("file_name", ["../../victim.png", "a/../../victim.png", "/tmp/victim.png"])
def test_label_maps_outside_the_folder_are_refused(two_images: str, file_name: str) -> None:
    change(two_images, lambda c: c["annotations"][0].update(file_name=file_name))
    with pytest.raises(
        ValueError,
        match=r"panoptic\.json: label maps whose file_name is not one of a file below their folder",
    ):
        PanopticEvaluator(two_images)


def test_ids_of_text_and_wide_ids(two_images: str, backend: str, tmp_path: Path) -> None:
    def edit(content: dict[str, Any]) -> None:
        for row in (*content["images"], *content["annotations"]):
            key = "id" if "id" in row else "image_id"
            row[key] = f"img_{row[key]}"
        for row in content["categories"]:
            row["id"] = 2**60 + row["id"]
        for annotation in content["annotations"]:
            for segment in annotation["segments_info"]:
                segment["category_id"] += 2**60

    change(two_images, edit)
    metadata = MetadataCatalog.get(two_images)
    things, stuff = {2**60 + 10: 0, 2**60 + 20: 1}, {2**60 + 30: 0}
    del metadata.thing_dataset_id_to_contiguous_id, metadata.stuff_dataset_id_to_contiguous_id
    metadata.set(thing_dataset_id_to_contiguous_id=things, stuff_dataset_id_to_contiguous_id=stuff)
    got = evaluate(two_images, IDS, SEGMENTS, "img_1", backend=backend, output_dir=str(tmp_path / "out"))
    assert got["PQ-cat"] == pytest.approx(100 * 50 / 60) and got["PQ-sky"] == pytest.approx(100 * 40 / 50)
    assert got["PQ-dog"] == 0
    saved = json.loads((tmp_path / "out" / "panoptic_predictions.json").read_text())["annotations"]
    assert [a["image_id"] for a in saved] == ["img_1", "img_2"]
    assert [s["category_id"] for s in saved[0]["segments_info"]] == [2**60 + 10, 2**60 + 30]


@pytest.mark.parametrize("wide", [2**24, 2**24 + 1, 2**33, -5])
def test_predicted_ids_that_do_not_fit_a_png(two_images: str, backend: str, wide: int) -> None:
    ids = torch.where(IDS == 2, wide, IDS)  # three bytes would hold 0, 1 or another id
    segments = [SEGMENTS[0], {**SEGMENTS[1], "id": wide}]
    got = evaluate(two_images, ids, segments, backend=backend)
    assert got["PQ-cat"] == pytest.approx(100 * 50 / 60) and got["PQ-sky"] == pytest.approx(100 * 40 / 50)


def test_missing_areas_and_crowd_flags(two_images: str, backend: str) -> None:
    def edit(content: dict[str, Any]) -> None:
        for annotation in content["annotations"]:
            for segment in annotation["segments_info"]:
                del segment["area"], segment["iscrowd"]

    change(two_images, edit)
    got = evaluate(two_images, IDS, SEGMENTS, backend=backend)
    assert got["PQ-cat"] == pytest.approx(100 * 50 / 60) and got["PQ-sky"] == pytest.approx(100 * 40 / 50)


def test_classes_of_one_name_keep_both_results(two_images: str, backend: str) -> None:
    change(two_images, lambda c: c["categories"][1].update(name="cat"))
    MetadataCatalog.get(two_images).novel_classes.clear()
    got = evaluate(two_images, IDS, SEGMENTS, backend=backend)
    assert got["PQ-cat (id 10)"] == pytest.approx(100 * 50 / 60) and got["PQ-cat (id 20)"] == 0
