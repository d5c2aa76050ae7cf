"""`SemanticEvaluator`: metrics computed by hand, and compared with hotcoco on real labels."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from clipdense.data.datasets.open_semantic import COCO_STUFF, COCO_STUFF_NOVEL
from clipdense.evaluation import SemanticEvaluator
from clipdense.evaluation.semantic import load_allowed_pairs, relax_confusion, segmentation_metrics

from detectron2.data import MetadataCatalog


@pytest.fixture
def make(register: Any, tmp_path: Path) -> Any:
    def run(labels: list[np.ndarray], classes: list[str], **metadata: Any) -> str:
        dicts = []
        for i, label in enumerate(labels):
            path = tmp_path / f"{i}{'.tif' if label.dtype == np.uint16 else '.png'}"
            Image.fromarray(label).save(path)
            dicts.append({"file_name": f"{i}.jpg", "sem_seg_file_name": str(path)})
        return str(register(dicts, stuff_classes=classes, **{"ignore_label": 255, **metadata}))

    return run


def evaluate(name: str, predictions: list[np.ndarray], **kwargs: Any) -> dict[str, float]:
    evaluator = SemanticEvaluator(name, **kwargs)
    evaluator.reset()
    for i, prediction in enumerate(predictions):
        evaluator.process([{"file_name": f"{i}.jpg"}], [{"sem_seg_labels": torch.from_numpy(prediction)}])
    result: dict[str, float] = evaluator.evaluate()["sem_seg"]
    return result


def test_by_hand(make: Any, tmp_path: Path) -> None:
    actual = np.array([[0, 0, 0, 1], [1, 1, 255, 255]], np.uint8)
    predicted = np.array([[0, 0, 1, 1], [1, 2, 0, 1]])
    name = make(
        [actual],
        ["a", "b", "c", "d"],
        novel_classes=["b"],
        stuff_dataset_id_to_contiguous_id={7: 0, 8: 1, 9: 2},
    )
    got = evaluate(name, [predicted], per_class=True, output_dir=str(tmp_path / "out"))
    iou = {"a": 2 / 3, "b": 2 / 4, "c": 0.0}  # c is predicted but nowhere labelled, d is neither
    for label, value in iou.items():
        assert got[f"IoU-{label}"] == pytest.approx(100 * value)
    assert math.isnan(got["IoU-d"]) and math.isnan(got["ACC-c"])
    assert got["mIoU"] == pytest.approx(100 * sum(iou.values()) / 3)
    assert got["mIoU_d2"] == pytest.approx(100 * sum(iou.values()) / 2)
    assert got["fwIoU"] == pytest.approx(100 * (3 * iou["a"] + 3 * iou["b"]) / 6)
    assert got["mACC"] == pytest.approx(100 * 2 / 3) and got["pACC"] == pytest.approx(100 * 4 / 6)
    assert got["mIoU_novel"] == pytest.approx(50) and got["mIoU_base"] == pytest.approx(100 / 3)
    assert got["hIoU"] == pytest.approx(2 * 50 * 100 / 3 / (50 + 100 / 3))
    assert got["mIoU_d2_novel"] == pytest.approx(50) and got["mIoU_d2_base"] == pytest.approx(200 / 3)
    assert got["hIoU_d2"] == pytest.approx(2 * 50 * 200 / 3 / (50 + 200 / 3))
    assert not any("relaxed" in key for key in got)
    saved = json.loads((tmp_path / "out" / "sem_seg_predictions.json").read_text())
    assert [row["category_id"] for row in saved] == [7, 8, 9] and saved[0]["segmentation"]["size"] == [2, 4]


def test_scores_and_labels_are_the_same(make: Any) -> None:
    rng = np.random.default_rng(0)
    actual = rng.integers(0, 5, (8, 9)).astype(np.uint8)
    scores = torch.from_numpy(rng.random((5, 8, 9)))
    name = make([actual], list("abcde"))
    evaluator = SemanticEvaluator(name)
    evaluator.reset()
    evaluator.process([{"file_name": "0.jpg"}], [{"sem_seg": scores}])
    assert evaluator.evaluate()["sem_seg"] == evaluate(name, [scores.argmax(0).numpy()])


def test_equals_hotcoco_on_real_labels(data_dir: Path, register: Any) -> None:
    from hotcoco.semantic import SemanticEval

    files = sorted((data_dir / "coco" / "panoptic_semseg_val2017").glob("*.png"))[:20]
    name = register(
        [{"file_name": f"{i}.jpg", "sem_seg_file_name": str(file)} for i, file in enumerate(files)],
        stuff_classes=[str(i) for i in range(133)],
        ignore_label=255,
    )
    rng = np.random.default_rng(1)
    other = SemanticEval(133)
    predictions = []
    for file in files:
        actual = np.array(Image.open(file)).astype(np.int64)
        predicted = np.roll(actual, rng.integers(1, 9, 2), (0, 1))
        predicted[predicted == 255] = int(rng.integers(133))
        predictions.append(predicted)
        other.update(actual, predicted)
    got, theirs = evaluate(name, predictions), other.results()
    for ours, key in (("mIoU", "mIoU"), ("fwIoU", "fwIoU"), ("mACC", "mAcc"), ("pACC", "aAcc")):
        assert got[ours] == pytest.approx(100 * theirs[key], rel=0, abs=1e-9)
        assert 5 < got[ours] < 99


def test_pixels_without_a_class_are_missed(make: Any, tmp_path: Path) -> None:
    """A rejected pixel lowers the IoU and the accuracy of its true class, and counts for no other class."""
    actual = np.array([[0, 0, 0, 1], [1, 1, 255, 255]], np.uint8)
    predicted = np.array([[0, 0, -1, 1], [-1, -1, -1, 0]])
    name = make([actual], ["a", "b", "c"])
    table = tmp_path / "pairs.json"
    table.write_text(json.dumps({"b": ["a"]}))
    kwargs = {"per_class": True, "output_dir": str(tmp_path / "out"), "allowed_pairs": table}
    got = evaluate(name, [predicted], **kwargs)
    assert got["IoU-a"] == pytest.approx(100 * 2 / 3) and got["IoU-b"] == pytest.approx(100 / 3)
    assert math.isnan(got["IoU-c"]) and got["mIoU"] == pytest.approx(50)
    assert got["ACC-b"] == pytest.approx(100 / 3) and got["pACC"] == pytest.approx(50)
    assert got["mIoU_relaxed"] == pytest.approx(50) and got["pACC_relaxed"] == pytest.approx(50)
    saved = json.loads((tmp_path / "out" / "sem_seg_predictions.json").read_text())
    assert sorted(segment["category_id"] for segment in saved) == [0, 1]
    with pytest.raises(ValueError, match=r"prediction of 0\.jpg: labels -2 to 1"):
        evaluate(name, [np.where(predicted == -1, -2, 1)])


def test_no_labelled_pixels(make: Any) -> None:
    name = make([np.full((4, 4), 255, np.uint8)], ["a", "b"], novel_classes=["a"])
    got = evaluate(name, [np.zeros((4, 4), np.int64)])
    assert all(math.isnan(value) for value in got.values()) and "hIoU" in got
    assert all(math.isnan(value) for value in evaluate(name, []).values())
    assert segmentation_metrics(np.zeros((2, 2), np.int64))[1].tolist() == pytest.approx(
        [np.nan] * 2, nan_ok=True
    )


def test_errors_name_the_cause(make: Any) -> None:
    name = make([np.array([[0, 7]], np.uint8)], ["a", "b"])
    with pytest.raises(ValueError, match=r"0\.png: labels 0 to 7, but .* has 2 classes \(void is 255\)"):
        evaluate(name, [np.zeros((1, 2), np.int64)])
    name = make([np.array([[0, 1]], np.uint8)], ["a", "b"])
    with pytest.raises(ValueError, match=r"0\.jpg: prediction of shape \(2, 2\), labels of \(1, 2\)"):
        evaluate(name, [np.zeros((2, 2), np.int64)])
    with pytest.raises(ValueError, match=r"prediction of 0\.jpg: labels 0 to 5"):
        evaluate(name, [np.array([[0, 5]])])


def published_means(confusion: np.ndarray) -> tuple[float, float]:
    """Compute both definitions of mIoU class by class: Detectron2 0.6's (OVSeg), and Detectron2's since."""
    total, labelled, occurring = 0.0, 0, 0
    for k in range(len(confusion)):
        hit = int(confusion[k, k])
        in_truth, in_prediction = int(confusion[k].sum()), int(confusion[:, k].sum())
        occurring += in_truth + in_prediction > 0
        if in_truth > 0:
            labelled += 1
            total += hit / (in_truth + in_prediction - hit)
    return 100 * total / occurring, 100 * total / labelled


def test_both_definitions_on_random_confusions() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        confusion = rng.integers(0, 9, (7, 7)) * (rng.random((7, 7)) < 0.5)
        confusion[rng.random(7) < 0.4] = 0  # not in the labels; some of these are predicted
        confusion[0, 0] += 1
        confusion[:, rng.choice(np.arange(1, 7), 2)] = 0
        got = segmentation_metrics(confusion)[0]
        assert (got["mIoU"], got["mIoU_d2"]) == pytest.approx(published_means(confusion), abs=1e-10)
    confusion = np.zeros((21, 21), np.int64)
    confusion[0, :20] = [1900, *[10] * 19]  # one class of IoU 0.909, 19 that are predicted alone
    got = segmentation_metrics(confusion)[0]
    assert got["mIoU"] == pytest.approx(got["mIoU_d2"] / 20) and got["mIoU_d2"] > 90


def test_wide_labels(make: Any) -> None:
    """300 classes, void 65535; predictions on void pixels are ignored."""
    actual = np.array([[299, 299, 256, 65535, 0]], np.uint16)
    name = make([actual], [f"class {i}" for i in range(300)], ignore_label=65535)
    got = evaluate(name, [np.array([[299, 256, 256, 7, 0]])], per_class=True)
    assert (got["IoU-class 299"], got["IoU-class 256"], got["IoU-class 0"]) == (50, 50, 100)
    assert math.isnan(got["IoU-class 7"]) and got["mIoU"] == got["mIoU_d2"] == pytest.approx(200 / 3)


def test_things_and_stuff(make: Any) -> None:
    labels, predicted = np.array([[0, 0, 1, 2]], np.uint8), [np.array([[0, 1, 1, 2]], np.uint8)]
    ids = {"thing_dataset_id_to_contiguous_id": {5: 0}}
    got = evaluate(make([labels], ["cat", "sky", "sea"], **ids), predicted)
    assert got["mIoU_thing"] == 50 and got["mIoU_stuff"] == 75

    # The ids of a separated panoptic dataset number its things, not the classes of its label maps.
    got = evaluate(make([labels], ["things", "sky", "sea"], thing_classes=["cat"], **ids), predicted)
    assert "mIoU_thing" not in got


def test_base_and_novel_classes_of_coco_stuff(make: Any) -> None:
    cow, tree, person = map(COCO_STUFF.index, ("cow", "tree", "person"))
    name = make(
        [np.array([[cow, tree, person, person]], np.uint8)], COCO_STUFF, novel_classes=COCO_STUFF_NOVEL
    )
    got = evaluate(name, [np.array([[cow, person, person, person]])])
    assert got["mIoU_novel"] == 50 and got["mIoU_base"] == pytest.approx(200 / 3)
    assert got["hIoU"] == got["hIoU_d2"] == pytest.approx(2 * 50 * 200 / 3 / (50 + 200 / 3))


CLASSES = ["building, edifice", "house", "skyscraper", "sky"]


def test_relaxed_metrics(make: Any, tmp_path: Path) -> None:
    """Allowed pairs hold in one direction, and do not change the strict metrics."""
    table = tmp_path / "pairs.json"
    table.write_text(json.dumps({"house": ["building"], "skyscraper": ["building, edifice"]}))
    actual = np.array([[1, 1, 1, 2, 0, 0, 3, 3]], np.uint8)
    predicted = np.array([[0, 1, 3, 0, 1, 0, 3, 3]])
    name = make([actual], CLASSES)
    got, strict = evaluate(name, [predicted], allowed_pairs=table), evaluate(name, [predicted])
    # building 1/2, house 2/4, skyscraper 1/1, sky 2/3
    assert got["mIoU_relaxed"] == pytest.approx(100 * (1 / 2 + 2 / 4 + 1 + 2 / 3) / 4)
    assert got["mIoU_d2_relaxed"] == got["mIoU_relaxed"]
    assert got["pACC_relaxed"] == pytest.approx(100 * 6 / 8)
    assert strict.items() <= got.items() and strict["mIoU"] < got["mIoU_relaxed"]


def test_relaxed_confusion_pixel_by_pixel() -> None:
    """Allowed predictions count as if they were the true class."""
    rng = np.random.default_rng(0)
    actual, predicted = rng.integers(0, 6, (2, 5000))
    allowed = (rng.random((6, 6)) < 0.3) & ~np.eye(6, dtype=bool)
    amended = np.where(allowed[actual, predicted], actual, predicted)
    confusion, expected = (
        np.bincount(actual * 6 + p, minlength=36).reshape(6, 6) for p in (predicted, amended)
    )
    assert np.array_equal(relax_confusion(confusion, allowed), expected) and not np.array_equal(
        confusion, expected
    )


def test_tables_of_allowed_pairs(tmp_path: Path) -> None:
    path = tmp_path / "pairs.json"
    path.write_text(json.dumps({"hose": ["sky"]}))
    with pytest.raises(ValueError, match=r"pairs\.json: no class 'hose' .*did you mean 'house'"):
        load_allowed_pairs(path, CLASSES)
    path.write_text(json.dumps([["house", "building"]]))
    with pytest.raises(ValueError, match=r"pairs\.json: expected .*true class"):
        load_allowed_pairs(path, CLASSES)
    path.write_text(json.dumps({"house": ["house", "Edifice"]}))
    assert np.argwhere(load_allowed_pairs(path, CLASSES)).tolist() == [[1, 0]]
    shipped = Path(__file__).parents[2] / "datasets" / "allowed_pairs_ade20k.json"
    allowed = load_allowed_pairs(shipped, MetadataCatalog.get("ade20k_sem_seg_val").stuff_classes)
    assert allowed.sum() == sum(map(len, json.loads(shipped.read_text()).values())) > 50
