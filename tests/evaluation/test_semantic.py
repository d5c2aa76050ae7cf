"""`SemanticEvaluator`: the metrics by hand, and beside hotcoco's on real labels."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from clipdense.evaluation import SemanticEvaluator
from clipdense.evaluation.semantic import segmentation_metrics


@pytest.fixture
def make(register: Any, tmp_path: Path) -> Any:
    def run(labels: list[np.ndarray], classes: list[str], **metadata: Any) -> str:
        dicts = []
        for i, label in enumerate(labels):
            Image.fromarray(label).save(tmp_path / f"{i}.png")
            dicts.append({"file_name": f"{i}.jpg", "sem_seg_file_name": str(tmp_path / f"{i}.png")})
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
    assert got["fwIoU"] == pytest.approx(100 * (3 * iou["a"] + 3 * iou["b"]) / 6)
    assert got["mACC"] == pytest.approx(100 * 2 / 3) and got["pACC"] == pytest.approx(100 * 4 / 6)
    assert got["mIoU_novel"] == pytest.approx(50) and got["mIoU_base"] == pytest.approx(100 / 3)
    assert got["hIoU"] == pytest.approx(2 * 50 * 100 / 3 / (50 + 100 / 3))
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


def test_nothing_to_judge(make: Any) -> None:
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
    with pytest.raises(ValueError, match=r"0\.jpg: prediction of shape \(2, 2\), labels of \(1, 2\)"):
        evaluate(name, [np.zeros((2, 2), np.int64)])
    name = make([np.array([[0, 1]], np.uint8)], ["a", "b"])
    with pytest.raises(ValueError, match=r"prediction of 0\.jpg: labels 0 to 5"):
        evaluate(name, [np.array([[0, 5]])])
