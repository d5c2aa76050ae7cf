"""F-VLM by tools/train_net.py: base classes in, AP of base and novel ones out."""

import argparse
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.usefixtures("small_shapes")


def test_trains_and_evaluates_with_the_classes_of_each_dataset(tmp_path: Path) -> None:
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


def test_real_images(tmp_path: Path, data_dir: Path) -> None:
    """OV-COCO classes and photographs on a nano CLIP: each image gets detections."""
    annotations = tmp_path / "coco" / "annotations"
    annotations.mkdir(parents=True)
    (tmp_path / "coco" / "val2017").symlink_to(data_dir / "coco" / "val2017")
    content = json.loads((data_dir / "coco/annotations/ovcoco_instances_val2017_all65.json").read_text())
    labelled = {a["image_id"] for a in content["annotations"]}
    content["images"] = [image for image in content["images"] if image["id"] in labelled][:4]
    kept = {image["id"] for image in content["images"]}
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] in kept]
    (annotations / "instances_val2017_all_2.json").write_text(json.dumps(content))

    options = ["DATASETS.TEST", "['ovcoco_2017_val']", "OUTPUT_DIR", str(tmp_path / "out")]
    options += ["MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0", "TEST.DETECTIONS_PER_IMAGE", "5"]
    command = [
        sys.executable,
        "tools/train_net.py",
        "--config-file",
        "configs/shapes/fvlm_rn.yaml",
        "--eval-only",
    ]
    environment = os.environ | {"DETECTRON2_DATASETS": str(tmp_path)}
    run = subprocess.run([*command, *options], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    results = json.loads((tmp_path / "out/inference/results.json").read_text())
    assert {"bbox/AP50", "bbox/AP50_base", "bbox/AP50_novel"} <= set(results)
    (predictions,) = (tmp_path / "out" / "inference").rglob("coco_instances_results.json")
    found = json.loads(predictions.read_text())
    assert {detection["image_id"] for detection in found} == kept
    assert {detection["category_id"] for detection in found} <= {c["id"] for c in content["categories"]}
