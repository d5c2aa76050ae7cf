"""`InstanceEvaluator`: from Detectron2's `Instances` to its result keys."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from benchmarks.evaluation import hotcoco_metrics
from pycocotools import mask as mask_utils

from clipdense.evaluation import InstanceEvaluator
from clipdense.evaluation.detections import Detections, encode_masks

from detectron2.structures import BitMasks, Boxes, Instances


def instances(rows: list[dict[str, Any]], masks: bool = True, dtype: torch.dtype = torch.bool) -> Instances:
    """Convert results of one image in COCO's format to the output of a model; classes count from 0."""
    height, width = 480, 640
    boxes = torch.tensor([r["bbox"] for r in rows], dtype=torch.float64).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    result = Instances((height, width), pred_boxes=Boxes(boxes))
    result.pred_boxes.tensor = boxes
    result.scores = torch.tensor([r["score"] for r in rows], dtype=torch.float64)
    result.pred_classes = torch.tensor([r["category_id"] - 1 for r in rows], dtype=torch.int64)
    if masks:
        decoded = [mask_utils.decode(r["segmentation"]) for r in rows]
        stacked = np.stack(decoded) if decoded else np.zeros((0, height, width))
        result.pred_masks = torch.from_numpy(stacked).to(dtype)
    return result


def feed(evaluator: Any, dataset: dict[str, Any], results: list[dict[str, Any]], **kwargs: Any) -> Any:
    evaluator.reset()
    for image in dataset["images"]:
        rows = [r for r in results if r["image_id"] == image["id"]]
        evaluator.process([{"image_id": image["id"]}], [{"instances": instances(rows, **kwargs)}])
    return evaluator.evaluate()


@pytest.fixture
def dataset_name(synthetic: Any, register: Any) -> str:
    return str(register(json_file=synthetic[0], **_metadata(synthetic[1])))


def _metadata(dataset: dict[str, Any]) -> dict[str, Any]:
    return {
        "thing_classes": [c["name"] for c in dataset["categories"]],
        "thing_dataset_id_to_contiguous_id": {c["id"]: i for i, c in enumerate(dataset["categories"])},
    }


@pytest.mark.parametrize("backend", ["hotcoco", "reference"])
def test_results_and_files(synthetic: Any, dataset_name: str, tmp_path: Path, backend: str) -> None:
    file, dataset, results = synthetic
    evaluator = InstanceEvaluator(dataset_name, output_dir=str(tmp_path), backend=backend)
    got = feed(evaluator, dataset, results, dtype=torch.float32)
    assert {task: list(metrics) for task, metrics in got.items()} == dict.fromkeys(
        ("bbox", "segm"), ["AP", "AP50", "AP75", "APs", "APm", "APl"]
    )
    for task, metrics in hotcoco_metrics(file, results).items():
        assert got[task] == pytest.approx(metrics, abs=1e-9)
    saved = json.loads((tmp_path / "coco_instances_results.json").read_text())
    assert len(saved) == len(results) and set(saved[0]) == set(results[0])
    # what is saved scores the same
    assert hotcoco_metrics(file, saved)["segm"] == pytest.approx(got["segm"], abs=1e-9)
    # a second run starts afresh
    assert feed(evaluator, dataset, results[:1], masks=False).keys() == {"bbox"}


def test_class_groups_and_classes(synthetic: Any, register: Any) -> None:
    _, dataset, results = synthetic
    names = [c["name"] for c in dataset["categories"]]
    novel, shapes = names[::4], names[:8:4]
    groups = {"novel_classes": novel, "novel_kinds": {"novel_shape": shapes}}
    name = register(json_file=synthetic[0], **_metadata(dataset), **groups)
    got = feed(InstanceEvaluator(name, per_class=True), dataset, results)["bbox"]

    def mean(members: list[str]) -> float:
        values = [got[f"AP-{n}"] for n in members]
        return float(np.nanmean(values))

    assert math.isnan(np.sum([got[f"AP-{n}"] for n in names]))  # some classes do not occur: they do not count
    assert got["AP"] == pytest.approx(mean(names))
    assert got["AP_novel"] == pytest.approx(mean(novel))
    assert got["AP_novel_shape"] == pytest.approx(mean(shapes))
    assert got["AP_base"] == pytest.approx(mean([n for n in names if n not in novel]))
    assert got["AP50_novel"] > got["AP_novel"] > 0
    assert list(got)[6:12] == [f"{m}_{g}" for g in ("novel", "novel_shape", "base") for m in ("AP", "AP50")]


def test_a_group_with_an_unknown_class_is_an_error(synthetic: Any, register: Any) -> None:
    name = register(json_file=synthetic[0], **_metadata(synthetic[1]), novel_classes=["class 1", "clas 2"])
    with pytest.raises(ValueError, match="novel class 'clas 2' is not a class; did you mean 'class 2'"):
        InstanceEvaluator(name)


def test_lvis_frequencies(synthetic: Any, register: Any, tmp_path: Path) -> None:
    _, dataset, results = synthetic
    for i, category in enumerate(dataset["categories"]):
        category["frequency"] = "rcf"[i % 3]
    path = tmp_path / "lvis.json"
    path.write_text(json.dumps(dataset))
    name = register(json_file=str(path), thing_classes=[c["name"] for c in dataset["categories"]])
    evaluator = InstanceEvaluator(name, "lvis", str(tmp_path), per_class=True)
    got = feed(evaluator, dataset, results)["segm"]
    assert list(got)[:9] == ["AP", "AP50", "AP75", "APs", "APm", "APl", "APr", "APc", "APf"]
    for i, group in enumerate("rcf"):
        expected = np.nanmean([got[f"AP-{c['name']}"] for c in dataset["categories"][i::3]])
        assert got[f"AP{group}"] == pytest.approx(float(expected))
    assert (tmp_path / "lvis_instances_results.json").is_file()


def test_no_detections_give_zeros(synthetic: Any, dataset_name: str, tmp_path: Path) -> None:
    _, dataset, _ = synthetic
    evaluator = InstanceEvaluator(dataset_name, output_dir=str(tmp_path))
    got = feed(evaluator, dataset, [])
    assert got["segm"]["AP"] == 0 and got["bbox"]["AP50"] == 0
    assert json.loads((tmp_path / "coco_instances_results.json").read_text()) == []
    evaluator.reset()
    assert evaluator.evaluate()["bbox"]["AP"] == 0  # no image at all


def test_a_dataset_without_annotation_file_is_converted(register: Any, tmp_path: Path) -> None:
    file = tmp_path / "image.png"
    record = {"file_name": str(file), "image_id": 7, "height": 480, "width": 640}
    annotation = {"bbox": [10.0, 10.0, 60.0, 60.0], "bbox_mode": 0, "category_id": 1, "iscrowd": 0}
    name = register([{**record, "annotations": [annotation]}], thing_classes=["a", "b"])
    evaluator = InstanceEvaluator(name, output_dir=str(tmp_path))
    evaluator.reset()
    row = {"bbox": [10, 10, 50, 50], "score": 0.5, "category_id": 2}
    evaluator.process([record], [{"instances": instances([row], masks=False)}])
    assert evaluator.evaluate()["bbox"]["AP"] == pytest.approx(100)
    with pytest.raises(ValueError, match="no annotation file"):
        InstanceEvaluator(name)


def test_errors_name_the_cause(synthetic: Any, dataset_name: str) -> None:
    _, dataset, results = synthetic
    evaluator = InstanceEvaluator(dataset_name)
    sample = [{"image_id": dataset["images"][0]["id"]}]
    wrong = instances([{**results[0], "category_id": 500}])
    with pytest.raises(ValueError, match="class 499.*80 thing classes.*NUM_CLASSES"):
        evaluator.process(sample, [{"instances": wrong}])
    broken = instances([{**results[0], "score": float("nan")}])
    with pytest.raises(ValueError, match="image 1: a detection has a score or a box that is NaN"):
        evaluator.process(sample, [{"instances": broken}])
    with pytest.raises(ValueError, match="image 99999 is not in the annotations"):
        evaluator.process([{"image_id": 99999}], [{"instances": instances([])}])
    with pytest.raises(KeyError, match="needs the output instances, but the model gives sem_seg"):
        evaluator.process(sample, [{"sem_seg": torch.zeros(1)}])


def test_masks_of_any_kind() -> None:
    masks = torch.zeros(2, 6, 9)
    masks[0, 1:4, 2:5] = 1
    rles = encode_masks(masks)
    np.testing.assert_array_equal(mask_utils.decode(rles[0]), masks[0].numpy())
    assert encode_masks(masks[:0]) == []
    # boxes that a model does not predict are taken from its masks
    result = Instances(
        (6, 9), pred_masks=BitMasks(masks.bool()), scores=torch.ones(2), pred_classes=torch.zeros(2)
    )
    found = Detections.from_instances(result, 5)
    assert found.boxes[0].tolist() == [2, 1, 3, 3]
    assert found.masks == rles and found.image_ids.tolist() == [5, 5]


def test_detections_keep_their_order() -> None:
    rows = [
        {"image_id": i, "category_id": 1, "bbox": [0, 0, 1, 1], "score": s}
        for i, s in [(2, 0.5), (1, 0.5), (2, 0.9), (2, 0.5), (1, 0.1)]
    ]
    top = Detections.from_json(rows).top_per_image(2)
    assert list(zip(top.image_ids.tolist(), top.scores.tolist(), strict=True)) == [
        (2, 0.5),
        (1, 0.5),
        (2, 0.9),
        (1, 0.1),
    ]
    assert Detections.concatenate([top, Detections.empty(masks=True)]).masks is None
    with pytest.raises(ValueError, match="some images have pred_masks"):
        Detections.concatenate(
            [top, Detections(top.image_ids, top.category_ids, top.boxes, top.scores, [{}] * 4)]
        )
