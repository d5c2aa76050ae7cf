"""Analyses behind a report: detections with known errors, and confusion of pixels."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import confusion_matrix

from clipdense.visualization.report.analysis import Analysis
from clipdense.visualization.report.document import Table
from clipdense.visualization.report.instances import analyze_instances
from clipdense.visualization.report.semantic import analyze_semantic
from tests.helpers import tiny_runs
from tests.helpers.tiny_runs import CLASSES, DETECTIONS, OBJECTS

from detectron2.data.catalog import Metadata


def analyze(folder: Path, objects: list[Any] = OBJECTS, detections: list[Any] = DETECTIONS) -> Analysis:
    folder.mkdir(exist_ok=True)
    (folder / "a.json").write_text(json.dumps(tiny_runs.coco_content(objects)))
    rows = json.dumps(tiny_runs.detection_rows(detections))
    (folder / "coco_instances_results.json").write_text(rows)
    known = {5 + k: k for k in range(len(CLASSES))}
    metadata = Metadata(
        json_file=str(folder / "a.json"),
        thing_classes=list(CLASSES),
        thing_dataset_id_to_contiguous_id=known,
    )
    return analyze_instances(folder, "tiny", metadata)


@pytest.fixture(scope="module")
def detections(tmp_path_factory: pytest.TempPathFactory) -> Analysis:
    return analyze(tmp_path_factory.mktemp("tiny"))


def changed(number: int, row: Any) -> list[Any]:
    """Return the detections with one replaced, or removed (None)."""
    rows = [*DETECTIONS[:number], row, *DETECTIONS[number + 1 :]]
    return [row for row in rows if row is not None]


def test_each_error_has_its_kind(detections: Analysis) -> None:
    numbers = {text.partition(":")[0]: number for text, _, number in detections.errors}
    assert numbers == {
        "class": 1,
        "location": 1,
        "both": 1,
        "duplicate": 1,
        "background": 1,
        "missed": 2,  # those of "both" and "background"
        "all false positives": None,
        "all false negatives": None,
    }


@pytest.mark.parametrize(
    ("kind", "objects", "mended"),
    [
        ("class", OBJECTS, changed(1, (1, 0, (10, 10, 40, 40), 0.85))),
        ("location", OBJECTS, changed(2, (2, 1, (10, 10, 40, 40), 0.8))),
        ("both", OBJECTS, changed(3, None)),
        ("duplicate", OBJECTS, changed(5, None)),
        ("background", OBJECTS, changed(6, None)),
        ("missed", [*OBJECTS[:3], None, OBJECTS[4], None], DETECTIONS),
    ],
)
def test_the_gain_is_that_of_mended_detections(
    kind: str, objects: list[Any], mended: list[Any], detections: Analysis, tmp_path: Path
) -> None:
    gains = {text.partition(":")[0]: gain for text, gain, _ in detections.errors}
    after = analyze(tmp_path, objects, mended).metrics["AP50"]
    assert gains[kind] == pytest.approx(after - detections.metrics["AP50"], abs=1e-4)


def test_classes_and_confusions_are_counted(detections: Analysis) -> None:
    assert [(row.name, row.count) for row in detections.classes] == [
        ("cat", 2),
        ("dog", 2),
        ("bird", 2),
        ("fish", 0),
    ]
    assert np.isnan(detections.classes[3].score)
    assert detections.classes[0].others["recall at IoU 0.5"] == pytest.approx(50)
    expected = np.zeros((5, 5), int)
    expected[0, 0] = expected[0, 1] = expected[2, 2] = 1
    expected[1, 4], expected[2, 4] = 2, 1  # objects without a detection
    expected[4, 1], expected[4, 2] = 1, 3  # detections without an object
    np.testing.assert_array_equal(detections.confusion, expected)


def test_images_are_ranked_and_drawn_with_the_ids_of_the_dataset(detections: Analysis) -> None:
    assert detections.image_scores.keys() == set(range(10, 16))
    assert detections.image_scores[10] == pytest.approx(100)
    assert detections.image_scores[15] == 0
    drawn = detections.draw(11)["instances"]
    assert drawn.pred_classes.tolist() == [1]
    assert drawn.pred_boxes.tensor.tolist() == [[10, 10, 50, 50]]
    assert len(detections.draw(14)["instances"]) == 2


def test_sizes_and_frequencies_cover_all_objects(detections: Analysis) -> None:
    sizes = detections.breakdowns["Size of the object"][1]
    assert [row[1] for row in sizes] == [1, 5, 0]
    frequency = detections.breakdowns["Frequency of the class"][1]
    assert sum(row[2] for row in frequency) == 6
    assert [row[1] for row in frequency] == [1, 1, 1]  # fish has no object


def test_a_better_run_has_an_interval_above_zero(detections: Analysis, tmp_path: Path) -> None:
    perfect = [(i, k, box, 0.9) for i, (k, box) in enumerate(OBJECTS)]
    better = analyze(tmp_path, OBJECTS, perfect)
    row = detections.compare(better, 40)["AP50"]
    assert row.second == pytest.approx(100)
    assert 0 < row.low <= row.second - row.first <= row.high
    same = detections.compare(detections, 40)["AP50"]
    assert same.low == same.high == 0
    assert np.isnan(detections.compare(better, 40)["APl"].low)


def semantic(folder: Path, predicted: list[np.ndarray]) -> Analysis:
    records = []
    for i, labels in enumerate(tiny_runs.label_maps(0)):
        Image.fromarray(labels).save(folder / f"{i}_labels.png")
        records.append(
            {"file_name": str(folder / f"{i}.png"), "sem_seg_file_name": str(folder / f"{i}_labels.png")}
        )
    tiny_runs.semantic_predictions(folder, [row["file_name"] for row in records], predicted)
    metadata = Metadata(stuff_classes=["sky", "sea", "sand"], ignore_label=255)
    return analyze_semantic(folder, "coast", metadata, records)


def test_confusion_of_pixels_equals_that_of_scikit_learn(tmp_path: Path) -> None:
    truth, predicted = tiny_runs.label_maps(0), [labels.clip(0, 2) for labels in tiny_runs.label_maps(1)]
    analysis = semantic(tmp_path, predicted)
    actual, found = np.concatenate(truth).ravel(), np.concatenate(predicted).ravel()
    expected = confusion_matrix(actual[actual != 255], found[actual != 255], labels=[0, 1, 2])
    np.testing.assert_array_equal(analysis.confusion, expected)
    assert analysis.classes[1].score == pytest.approx(
        100 * expected[1, 1] / (expected[1].sum() + expected[:, 1].sum() - expected[1, 1])
    )
    np.testing.assert_array_equal(
        analysis.draw(str(tmp_path / "2.png"))["sem_seg_labels"].numpy(), predicted[2]
    )


def test_label_maps_are_compared_on_the_same_images(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    truth = [labels.clip(0, 2) for labels in tiny_runs.label_maps(0)]
    random = semantic(tmp_path / "a", [labels.clip(0, 2) for labels in tiny_runs.label_maps(1)])
    perfect = semantic(tmp_path / "a", truth)
    row = random.compare(perfect, 50)["mIoU"]
    assert perfect.metrics["mIoU"] == 100
    assert 0 < row.low <= row.second - row.first <= row.high
    with pytest.raises(ValueError, match="different images"):
        random.compare(semantic(tmp_path / "b", truth), 5)


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    analyze(tmp_path)
    path = tmp_path / "coco_instances_results.json"
    path.write_text('[{"image_id": 1}]')
    with pytest.raises(ValueError, match="coco_instances_results.json: not a list of detections"):
        analyze_instances(tmp_path, "tiny", Metadata(json_file=str(tmp_path / "a.json")))


def test_small_numbers_have_no_sign() -> None:
    table = Table(["a"], [], digits=1)
    assert [table.text(x) for x in (-0.04, 0.04, -0.06, math.nan, 3)] == ["0.0", "0.0", "-0.1", "\u2013", "3"]
