"""F-VLM by tools/train_net.py: base classes in, AP of base and novel ones out."""

import argparse
import json
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.usefixtures("small_shapes")


def test_trains_and_evaluates_with_the_words_of_each_data_set(tmp_path: Path) -> None:
    main = runpy.run_path(str(ROOT / "tools/train_net.py"))["main"]

    def run(*options: object, eval_only: bool = False) -> dict[str, float]:
        options = ("OUTPUT_DIR", tmp_path / "out", "TEST.DETECTIONS_PER_IMAGE", 5, *options)
        return main(
            argparse.Namespace(
                config_file=str(ROOT / "configs/shapes/fvlm_vit.yaml"),
                opts=list(map(str, options)),
                resume=False,
                eval_only=eval_only,
            )
        )

    results = run("SOLVER.MAX_ITER", 2, "SOLVER.IMS_PER_BATCH", 2)
    assert {"bbox/AP50", "bbox/AP50_base", "bbox/AP50_novel"} <= set(results)
    log = [json.loads(line) for line in (tmp_path / "out/metrics.json").read_text().splitlines()]
    assert any("loss_cls" in row and "loss_rpn_cls" in row for row in log)

    both = "['shapes_ov_mini_val', 'shapes_ov_mini_train']"  # 80 and 60 classes
    again = run("MODEL.WEIGHTS", tmp_path / "out/model_final.pth", "DATASETS.TEST", both, eval_only=True)
    assert again["shapes_ov_mini_val/bbox/AP50"] == pytest.approx(results["bbox/AP50"], nan_ok=True)
    assert "shapes_ov_mini_train/bbox/AP50" in again
