"""Annotation files with unusual ids, and objects without masks: the same right value from both backends."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from clipdense.evaluation import InstanceEvaluator, SemanticEvaluator
from clipdense.evaluation.average_precision import average_precision_backend
from clipdense.evaluation.base import distinct_names
from clipdense.evaluation.detections import Detections
from clipdense.evaluation.groups import class_groups
from tests.helpers.detection_results import encode_mask

from detectron2.data import MetadataCatalog
from detectron2.structures import Boxes, Instances


@pytest.fixture(params=["hotcoco", "reference"])
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def content(image_ids: list[Any], category_ids: list[Any]) -> dict[str, Any]:
    """Make an annotation file with one object of each category in each image."""
    pairs = [(i, c) for i in range(len(image_ids)) for c in range(len(category_ids))]
    return {
        "images": [
            {"id": i, "file_name": f"{k}.png", "height": 80, "width": 400} for k, i in enumerate(image_ids)
        ],
        "categories": [{"id": c, "name": f"class {k}"} for k, c in enumerate(category_ids)],
        "annotations": [
            {
                "id": n,
                "image_id": image_ids[i],
                "category_id": category_ids[c],
                "bbox": [50.0 * c, 10.0 * i, 40.0, 30.0],
                "area": 1200,
                "iscrowd": 0,
            }
            for n, (i, c) in enumerate(pairs, 1)
        ],
    }


def save(tmp_path: Path, annotations: dict[str, Any]) -> str:
    path = tmp_path / "annotations.json"
    path.write_text(json.dumps(annotations))
    return str(path)


def results(annotations: dict[str, Any], masks: bool = False) -> list[dict[str, Any]]:
    """Detections that equal the boxes of the objects, best first."""
    rows = []
    for k, row in enumerate(annotations["annotations"]):
        x, y, w, h = (int(v) for v in row["bbox"])
        rows.append(
            {key: row[key] for key in ("image_id", "category_id", "bbox")} | {"score": 0.9 - 0.01 * k}
        )
        if masks:
            mask = np.zeros((80, 400))
            mask[y : y + h, x : x + w] = 1
            rows[-1]["segmentation"] = encode_mask(mask)
    return rows


IDS = {
    "text": (["img_1", "img_10", "img_2"], ["2", "10"]),
    "60 bits": ([2**60 + k for k in range(3)], [2**53, 2**53 + 1]),
    "above 64 bits": ([2**70 + k for k in range(3)], [1, 2]),
    "negative": ([-1, -(2**60), 0], [-5, 0]),
    "mixed": ([1, "1", 2], [7, "seven"]),
}


@pytest.mark.parametrize("rules", ["coco", "lvis"])
@pytest.mark.parametrize("images, categories", IDS.values(), ids=IDS.keys())
def test_ids_of_any_kind(
    tmp_path: Path, backend: str, rules: Any, images: list[Any], categories: list[Any]
) -> None:
    truth = content(images, categories)
    truth["images"][0]["neg_category_ids"] = [categories[0], 99]
    found = results(truth)
    found[1]["image_id"] = images[2]  # one object of the second class is missed, after a false positive
    file = save(tmp_path, truth)
    table = average_precision_backend(backend, file, rules)
    precision = table.table(Detections.from_json(found), "bbox", 300)
    assert precision.ap(category_ids=[categories[0]]) == pytest.approx(100)
    # recall 2 / 3 (67 of 101 points) at precision 2 / 3
    assert precision.ap(category_ids=[categories[1]]) == pytest.approx(100 * 67 / 101 * 2 / 3)
    assert {c["id"] for c in precision.categories} == set(categories)
    assert table.image_ids == set(images)


def test_annotation_ids_of_text(tmp_path: Path, backend: str) -> None:
    truth = content([1, 2], [1])
    for row in truth["annotations"]:
        row["id"] = f"a{row['id']}"
    table = average_precision_backend(backend, save(tmp_path, truth), "coco")
    assert table.table(Detections.from_json(results(truth)), "bbox", 100).ap() == pytest.approx(100)


def test_saved_results_keep_the_ids(tmp_path: Path, register: Any, backend: str) -> None:
    truth = content(["a", "b"], ["x", 2**60])
    name = register(
        json_file=save(tmp_path, truth),
        thing_classes=["class 0", "class 1"],
        thing_dataset_id_to_contiguous_id={"x": 0, 2**60: 1},
    )
    evaluator = InstanceEvaluator(name, output_dir=str(tmp_path), backend=backend, distributed=False)
    for image_id in ("a", "b"):
        rows = [r for r in results(truth) if r["image_id"] == image_id]
        boxes = torch.tensor([r["bbox"] for r in rows])
        boxes[:, 2:] += boxes[:, :2]
        found = Instances((80, 400), pred_boxes=Boxes(boxes))
        found.scores, found.pred_classes = torch.tensor([0.9, 0.8]), torch.tensor([0, 1])
        evaluator.process([{"image_id": image_id}], [{"instances": found}])
    assert evaluator.evaluate()["bbox"]["AP"] == pytest.approx(100)
    saved = json.loads((tmp_path / "coco_instances_results.json").read_text())
    assert [(r["image_id"], r["category_id"]) for r in saved] == [
        (i, c) for i in ("a", "b") for c in ("x", 2**60)
    ]


@pytest.mark.parametrize("empty", [None, [], [[]], "missing"])
def test_a_box_is_never_taken_for_a_mask(
    tmp_path: Path, backend: str, empty: Any, caplog: pytest.LogCaptureFixture
) -> None:
    truth = content([1], [1, 2])
    found = results(truth, masks=True)
    truth["annotations"][0]["segmentation"] = empty
    if empty == "missing":
        del truth["annotations"][0]["segmentation"]
    truth["annotations"][1]["segmentation"] = found[1]["segmentation"]
    table = average_precision_backend(backend, save(tmp_path, truth), "coco")
    detections = Detections.from_json(found)
    assert table.table(detections, "bbox", 100).ap() == pytest.approx(100)
    masks = table.table(detections, "segm", 100)
    assert (masks.ap(category_ids=[1]), masks.ap(category_ids=[2])) == (0, pytest.approx(100))
    assert "1 of 2 objects have a box but no mask" in caplog.text


def test_a_file_without_masks_has_no_mask_metrics(tmp_path: Path, backend: str) -> None:
    truth = content([1], [1, 2])
    table = average_precision_backend(backend, save(tmp_path, truth), "coco")
    assert math.isnan(table.table(Detections.from_json(results(truth, masks=True)), "segm", 100).ap())


@pytest.mark.parametrize(
    "change, message",
    [({"category_id": 9}, "category_id 9"), ({"bbox": [1, 2, 3]}, "bbox"), ({"image_id": None}, "image_id")],
)
def test_faults_are_refused_by_name(tmp_path: Path, backend: str, change: Any, message: str) -> None:
    truth = content([1], [1])
    truth["annotations"][0].update(change)
    with pytest.raises(ValueError, match=rf"annotations\.json: .*{message}"):
        average_precision_backend(backend, save(tmp_path, truth), "coco")


def test_detections_of_an_unknown_image_are_refused(tmp_path: Path, backend: str) -> None:
    truth = content([1], [1])
    found = [{**results(truth)[0], "image_id": "x"}]
    table = average_precision_backend(backend, save(tmp_path, truth), "coco")
    with pytest.raises(ValueError, match="image 'x' is not in the annotations"):
        table.table(Detections.from_json(found), "bbox", 100)


def test_classes_of_one_name_keep_both_results(tmp_path: Path, register: Any) -> None:
    truth = content([1], [0, 1, 2])
    for row, name in zip(truth["categories"], ("pothole", "pothole", "crack"), strict=True):
        row["name"] = name
    name = register(
        json_file=save(tmp_path, truth),
        thing_classes=["pothole", "pothole", "crack"],
        thing_dataset_id_to_contiguous_id={0: 0, 1: 1, 2: 2},
        novel_classes=["pothole"],
    )
    evaluator = InstanceEvaluator(name, per_class=True, distributed=False)
    found = Instances((80, 400), pred_boxes=Boxes(torch.tensor([[0.0, 0, 40, 30]])))
    found.scores, found.pred_classes = torch.tensor([0.9]), torch.tensor([0])
    evaluator.process([{"image_id": 1}], [{"instances": found}])
    got = evaluator.evaluate()["bbox"]
    by_class = {key: value for key, value in got.items() if key.startswith("AP-")}
    assert by_class == {
        "AP-pothole (id 0)": pytest.approx(100),
        "AP-pothole (id 1)": 0,
        "AP-crack": 0,
    }
    assert got["AP_novel"] == pytest.approx(50)
    metadata = MetadataCatalog.get(name)
    assert class_groups(metadata, metadata.thing_classes) == {"novel": [0, 1], "base": [2]}


def test_label_maps_with_two_classes_of_one_name(tmp_path: Path, register: Any) -> None:
    labels = np.array([[0, 1], [2, 2]], np.uint8)
    Image.fromarray(labels).save(tmp_path / "a.png")
    record = {"file_name": "a", "sem_seg_file_name": str(tmp_path / "a.png")}
    name = register([record], stuff_classes=["road", "road", "sky"], ignore_label=255)
    evaluator = SemanticEvaluator(name, per_class=True, distributed=False)
    evaluator.process([record], [{"sem_seg_labels": torch.tensor([[0, 2], [2, 2]])}])
    got = evaluator.evaluate()["sem_seg"]
    assert (got["IoU-road (id 0)"], got["IoU-road (id 1)"]) == (100, 0)
    assert (got["ACC-road (id 0)"], got["ACC-road (id 1)"]) == (100, 0)


def test_distinct_names() -> None:
    assert distinct_names("aba", [1, 2, "x"]) == ["a (id 1)", "b", "a (id x)"]
