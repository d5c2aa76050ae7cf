"""`OracleClassEvaluator`: proposals with oracle classes, computed by hand."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from clipdense.evaluation import OracleClassEvaluator


def evaluate(name: str, masks: torch.Tensor) -> dict[str, float]:
    evaluator = OracleClassEvaluator(name, per_class=True)
    evaluator.reset()
    evaluator.process([{"file_name": "0.jpg"}], [{"proposal_masks": masks}])
    result: dict[str, float] = evaluator.evaluate()["oracle_classes"]
    return result


def test_majority_class_and_largest_probability(register: Any, tmp_path: Path) -> None:
    actual = np.array([[0, 0, 1, 1], [0, 255, 2, 1]], np.uint8)
    Image.fromarray(actual).save(tmp_path / "0.png")
    dicts = [{"file_name": "0.jpg", "sem_seg_file_name": str(tmp_path / "0.png")}]
    name = register(dicts, stuff_classes=["a", "b", "c"], ignore_label=255, novel_classes=["b"])
    masks = torch.tensor(
        [
            [[0.9, 0.9, 0.6, 0.1], [0.9, 0.9, 0.1, 0.1]],  # three of a, one of b: a
            [[0.1, 0.1, 0.8, 0.8], [0.1, 0.1, 0.8, 0.8]],  # three of b, one of c: b
            [[0.4, 0.4, 0.4, 0.4], [0.4, 0.4, 0.4, 0.4]],  # nowhere above 0.5: left out
            [[0.3, 0.3, 0.3, 0.3], [0.3, 1.0, 0.3, 0.3]],  # void alone: left out
        ]
    )
    got = evaluate(name, masks)  # a a b b / a . b b
    assert got["IoU-a"] == 100 and got["IoU-b"] == 75 and got["IoU-c"] == 0
    assert got["mIoU_novel"] == 75 and got["mIoU_base"] == 50
    worse = evaluate(name, masks.roll(1, dims=2))
    assert worse["mIoU"] < got["mIoU"]


def test_masks_of_another_size(register: Any, tmp_path: Path) -> None:
    actual = np.zeros((8, 12), np.uint8)
    actual[:, 6:] = 1
    Image.fromarray(actual).save(tmp_path / "0.png")
    dicts = [{"file_name": "0.jpg", "sem_seg_file_name": str(tmp_path / "0.png")}]
    name = register(dicts, stuff_classes=["a", "b"], ignore_label=255)
    masks = torch.zeros(2, 4, 6)
    masks[0, :, :3] = masks[1, :, 3:] = 1
    assert evaluate(name, masks)["mIoU"] == pytest.approx(100)
    assert evaluate(name, torch.zeros(2, 4, 6))["IoU-b"] == 0  # nothing is told a class


def test_labels_beyond_the_classes_are_named(register: Any, tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 6), 7, np.uint8)).save(tmp_path / "0.png")
    dicts = [{"file_name": "0.jpg", "sem_seg_file_name": str(tmp_path / "0.png")}]
    name = register(dicts, stuff_classes=["a", "b"], ignore_label=255)
    with pytest.raises(ValueError, match=r"0\.png: labels 7 to 7, but '.*' has 2 classes"):
        evaluate(name, torch.ones(1, 4, 6))
