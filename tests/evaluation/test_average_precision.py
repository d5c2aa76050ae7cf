"""AP equals pycocotools' on real and synthetic data, and hand-computed cases of LVIS."""

import contextlib
import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from benchmarks.evaluation import hotcoco_metrics, pycocotools_metrics
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from clipdense.evaluation.average_precision import average_precision_backend
from clipdense.evaluation.detections import Detections
from tests.helpers.detection_results import encode_mask, perturbed_detections

BACKENDS = ("hotcoco", "reference")


def pycocotools_arrays(file: str, results: list[dict[str, Any]], task: str) -> tuple[np.ndarray, np.ndarray]:
    """Compute AP with pycocotools as its users call it."""
    with contextlib.redirect_stdout(io.StringIO()):
        ground_truth = COCO(file)
        dropped = "bbox" if task == "segm" else ""
        rows = [{key: value for key, value in row.items() if key != dropped} for row in results]
        evaluation = COCOeval(ground_truth, ground_truth.loadRes(rows), task)
        evaluation.evaluate()
        evaluation.accumulate()
    return evaluation.eval["precision"][..., -1], evaluation.eval["recall"][..., -1]


@pytest.mark.parametrize(
    "file", ["annotations/instances_val2017.json", "annotations/ovcoco_instances_val2017_all65.json"]
)
def test_equals_pycocotools_on_real_annotations(data_dir: Path, tmp_path: Path, file: str) -> None:
    dataset = subset(json.loads((data_dir / "coco" / file).read_text()), step=9)
    assert any(a["iscrowd"] for a in dataset["annotations"])
    path = tmp_path / "instances.json"
    path.write_text(json.dumps(dataset))
    results = perturbed_detections(dataset, seed=1)
    tables = average_precision_backend("hotcoco", str(path), "coco")
    for task in ("bbox", "segm"):
        precision, recall = pycocotools_arrays(str(path), results, task)
        table = tables.table(Detections.from_json(results), task, 100)
        np.testing.assert_allclose(table.precision, precision, rtol=0, atol=1e-9)
        np.testing.assert_allclose(table.recall, recall, rtol=0, atol=1e-9)
        assert 1 < table.ap() < 99
        reversed_ = Detections.from_json([{**row, "score": -row["score"]} for row in results])
        assert abs(tables.table(reversed_, task, 100).ap() - table.ap()) > 0.1


def subset(dataset: dict[str, Any], step: int) -> dict[str, Any]:
    """Every step-th image (pycocotools is slow), those with crowds first, and the classes that they are
    about."""
    crowds = {a["image_id"] for a in dataset["annotations"] if a.get("iscrowd")}
    images = sorted(dataset["images"], key=lambda image: image["id"] not in crowds)[::step]
    kept = {image["id"] for image in images}
    annotations = [a for a in dataset["annotations"] if a["image_id"] in kept]
    classes = {a["category_id"] for a in annotations}
    for image in images:
        classes.update(image.get("neg_category_ids", ()))
    categories = [c for c in dataset["categories"] if c["id"] in classes]
    return {"images": images, "annotations": annotations, "categories": categories}


def test_metrics_equal_pycocotools_summary(synthetic: Any) -> None:
    file, dataset, results = synthetic
    results = results + perturbed_detections(dataset, seed=2)
    ours, other = hotcoco_metrics(file, results), pycocotools_metrics(file, results)
    for task in ("bbox", "segm"):
        assert ours[task] == pytest.approx(other[task], rel=0, abs=1e-9)
        assert len(set(ours[task].values())) == 6


@pytest.mark.parametrize("max_dets", [1, 100, 300])
@pytest.mark.parametrize("rules", ["coco", "lvis"])
def test_backends_agree(synthetic: Any, rules: Any, max_dets: int) -> None:
    file, dataset, _ = synthetic
    detections = Detections.from_json(perturbed_detections(dataset, seed=4))
    for task in ("bbox", "segm"):
        ours, other = (
            average_precision_backend(b, file, rules).table(detections, task, max_dets) for b in BACKENDS
        )
        np.testing.assert_allclose(ours.precision, other.precision, rtol=0, atol=1e-9)
        np.testing.assert_allclose(ours.recall, other.recall, rtol=0, atol=1e-9)


def test_lvis_backends_agree_on_real_annotations(data_dir: Path, tmp_path: Path) -> None:
    path = data_dir / "lvis" / "lvis_v0.5_val_100_images_available.json"
    dataset = subset(json.loads(path.read_text()), step=3)
    (tmp_path / "lvis.json").write_text(json.dumps(dataset))
    detections = Detections.from_json(perturbed_detections(dataset, seed=0))
    backends = [average_precision_backend(b, str(tmp_path / "lvis.json"), "lvis") for b in BACKENDS]
    for task in ("bbox", "segm"):
        ours, other = (backend.table(detections, task, 100) for backend in backends)
        np.testing.assert_allclose(ours.precision, other.precision, rtol=0, atol=1e-9)
        np.testing.assert_allclose(ours.recall, other.recall, rtol=0, atol=1e-9)
        assert 1 < ours.ap() < 99


def test_lvis_equals_lvis_api(data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Results equal those of lvis-api, if it is installed (`pip install lvis`)."""
    lvis = pytest.importorskip(
        "lvis", reason="lvis-api is not installed; LVIS is checked by hand-computed cases"
    )
    monkeypatch.setattr(np, "float", float, raising=False)  # it was written for NumPy 1.19
    path = data_dir / "lvis" / "lvis_v0.5_val_100_images_available.json"
    dataset = subset(json.loads(path.read_text()), step=3)
    file = str(tmp_path / "lvis.json")
    Path(file).write_text(json.dumps(dataset))
    results = perturbed_detections(dataset, seed=5)
    for task in ("bbox", "segm"):
        dropped = "bbox" if task == "segm" else ""
        rows = [{key: value for key, value in row.items() if key != dropped} for row in results]
        truth = lvis.LVIS(file)
        theirs = lvis.LVISEval(truth, lvis.LVISResults(truth, rows, max_dets=100), task)
        theirs.run()
        table = average_precision_backend("hotcoco", file, "lvis").table(
            Detections.from_json(results), task, 100
        )
        np.testing.assert_allclose(table.precision, theirs.eval["precision"], rtol=0, atol=1e-9)
        np.testing.assert_allclose(table.recall, theirs.eval["recall"], rtol=0, atol=1e-9)


# Cases computed by hand


def box(image: int, category: int, x: float, score: float | None = None, **fields: Any) -> dict[str, Any]:
    """Make a 40 x 40 box at x: an annotation, or with a score a result."""
    row = {"image_id": image, "category_id": category, "bbox": [x, 10.0, 40.0, 40.0], **fields}
    polygon = [x, 10.0, x + 40, 10.0, x + 40, 50.0, x, 50.0]
    if score is None:
        return {**row, "area": 1600.0, "iscrowd": 0, "segmentation": [polygon]}
    mask = np.zeros((100, 400), np.uint8)
    mask[10:50, int(x) : int(x) + 40] = 1
    return {**row, "score": score, "segmentation": encode_mask(mask)}


def write(tmp_path: Path, annotations: list[dict[str, Any]], **image_fields: dict[int, list[int]]) -> str:
    frequencies = {1: "r", 2: "c", 3: "f", 4: "f"}
    images = [
        {"id": i, "width": 400, "height": 100, **{k: v.get(i, []) for k, v in image_fields.items()}}
        for i in (1, 2)
    ]
    categories = [{"id": i, "name": f"class {i}", "frequency": f} for i, f in frequencies.items()]
    numbered = [{"id": i, **annotation} for i, annotation in enumerate(annotations, 1)]
    path = tmp_path / "annotations.json"
    path.write_text(json.dumps({"images": images, "categories": categories, "annotations": numbered}))
    return str(path)


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("task", ["bbox", "segm"])
def test_lvis_by_hand(tmp_path: Path, backend: str, task: str) -> None:
    file = write(
        tmp_path,
        [box(1, 1, 0), box(1, 2, 100), box(2, 2, 0), box(2, 3, 100)],
        neg_category_ids={1: [3], 2: [1]},
        not_exhaustive_category_ids={2: [2]},
    )
    results = [
        box(1, 1, 0, 0.9),  # class 1: found; a false positive where it is known to be absent, scored below
        box(2, 1, 200, 0.5),
        box(1, 2, 100, 0.8),  # class 2: one found, one missed;
        box(2, 2, 300, 0.9),  # unmatched, but image 2 is not exhaustive for class 2: ignored
        box(2, 3, 100, 0.6),  # class 3: found, after a false positive in image 1, which lists it as absent
        box(1, 3, 200, 0.7),
        box(1, 4, 0, 0.99),  # class 4: image 1 says nothing of it
    ]
    table = average_precision_backend(backend, file, "lvis").table(Detections.from_json(results), task, 300)
    # class 1: precision 1 up to recall 1. Class 2: 1 up to recall 0.5 (51 of 101 points). Class 3: 1/2.
    by_class = {1: 100.0, 2: 100 * 51 / 101, 3: 50.0}
    for category, expected in by_class.items():
        assert table.ap(category_ids=[category]) == pytest.approx(expected, abs=1e-9)
    assert math.isnan(table.ap(category_ids=[4]))
    assert table.ap() == pytest.approx(sum(by_class.values()) / 3, abs=1e-9)
    # all boxes measure 1600 pixels: medium
    assert table.ap(area="medium") == pytest.approx(table.ap(), abs=1e-9)
    assert math.isnan(table.ap(area="small")) and math.isnan(table.ap(area="large"))
    # under COCO's rules every unmatched detection counts: class 2 loses by the one with the higher score
    coco = average_precision_backend(backend, file, "coco").table(Detections.from_json(results), task, 100)
    assert coco.ap(category_ids=[2]) == pytest.approx(100 * 51 / 101 / 2, abs=1e-9)


def test_lvis_limit_is_per_image_over_classes(tmp_path: Path, backend: str) -> None:
    file = write(tmp_path, [box(1, 1, 0), box(1, 2, 100)])
    results = [box(1, 1, 0, 0.9), box(1, 2, 100, 0.8)]
    tables = average_precision_backend(backend, file, "lvis")
    assert tables.table(Detections.from_json(results), "bbox", 2).ap() == pytest.approx(100)
    assert tables.table(Detections.from_json(results), "bbox", 1).ap() == pytest.approx(50)


def test_lvis_drops_annotations_and_detections_without_area(tmp_path: Path, backend: str) -> None:
    empty = {**box(1, 1, 0, 0.95), "segmentation": encode_mask(np.zeros((100, 400)))}
    file = write(tmp_path, [box(1, 1, 0), {**box(1, 1, 200), "area": 0.0}])
    detections = Detections.from_json([empty, box(1, 1, 0, 0.9)])
    assert detections.areas("segm").tolist() == [0, 1600]
    assert average_precision_backend(backend, file, "lvis").table(
        detections, "segm", 300
    ).ap() == pytest.approx(100)
    # COCO counts it, and it stands first: one of two objects found, at precision 1/2
    coco = average_precision_backend(backend, file, "coco").table(detections, "segm", 100).ap()
    assert coco == pytest.approx(100 * 51 / 101 / 2, abs=1e-9)


def test_an_annotation_with_id_0_is_found(tmp_path: Path, backend: str) -> None:
    file = write(tmp_path, [{**box(1, 1, 0), "id": 0}])
    results = [box(1, 1, 0, 0.9)]
    table = average_precision_backend(backend, file, "coco").table(Detections.from_json(results), "bbox", 100)
    assert table.ap() == pytest.approx(100)
    assert pycocotools_arrays(file, results, "bbox")[0].max() == 0  # the fault that is worked round


def test_a_missing_area_is_that_of_the_box(tmp_path: Path, backend: str) -> None:
    file = write(tmp_path, [{k: v for k, v in box(1, 1, 0).items() if k not in ("area", "iscrowd")}])
    detections = Detections.from_json([box(1, 1, 0, 0.9)])
    table = average_precision_backend(backend, file, "coco").table(detections, "bbox", 100)
    assert table.ap(area="medium") == pytest.approx(100) and math.isnan(table.ap(area="small"))


@pytest.mark.parametrize("rules", ["coco", "lvis"])
def test_nothing_detected_and_nothing_to_detect(tmp_path: Path, backend: str, rules: Any) -> None:
    file = write(tmp_path, [box(1, 1, 0)])
    tables = average_precision_backend(backend, file, rules)
    for task in ("bbox", "segm"):
        assert tables.table(Detections.empty(masks=True), task, 100).ap() == 0
    file = write(tmp_path, [])
    tables = average_precision_backend(backend, file, rules)
    assert math.isnan(tables.table(Detections.from_json([box(1, 1, 0, 0.9)]), "segm", 100).ap())


def test_files_with_nulls_and_of_another_format(tmp_path: Path) -> None:
    file = write(tmp_path, [{**box(1, 1, 0), "caption": None}])
    content = json.loads(Path(file).read_text())
    Path(file).write_text(json.dumps({**content, "licenses": None}))
    table = average_precision_backend("hotcoco", file, "coco").table(
        Detections.from_json([box(1, 1, 0, 0.9)]), "bbox", 100
    )
    assert table.ap() == pytest.approx(100)
    for text in ('{"images": [', '["images"]', '{"images": [{"id": "a"}]}'):
        Path(file).write_text(text)
        with pytest.raises(ValueError, match=r"annotations\.json: "):
            average_precision_backend("hotcoco", file, "coco")


def test_unknown_backend_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'cocoapi'; expected hotcoco, reference"):
        average_precision_backend("cocoapi", write(tmp_path, []), "coco")
