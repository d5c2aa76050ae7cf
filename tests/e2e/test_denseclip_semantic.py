"""DenseCLIP's Semantic FPN by tools/train_net.py: semantic maps in, mIoU and pictures out."""

import argparse
import json
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.usefixtures("small_shapes")


def test_trains_and_evaluates(tmp_path: Path) -> None:
    main = runpy.run_path(str(ROOT / "tools/train_net.py"))["main"]

    def run(*options: object, eval_only: bool = False) -> dict[str, float]:
        return main(
            argparse.Namespace(
                config_file=str(ROOT / "configs/shapes/denseclip_semantic_fpn_rn.yaml"),
                opts=list(map(str, ("OUTPUT_DIR", tmp_path / "out", *options))),
                resume=False,
                eval_only=eval_only,
            )
        )

    results = run("SOLVER.MAX_ITER", 2, "SOLVER.IMS_PER_BATCH", 2, "SOLVER.LOG_PERIOD", 1)
    assert 0 <= results["sem_seg/mIoU"] <= 100
    rows = [json.loads(line) for line in (tmp_path / "out/metrics.json").read_text().splitlines()]
    assert {"loss_sem_seg", "loss_pixel_text"} <= set().union(*rows)
    assert list((tmp_path / "out").rglob("scores_*.png"))

    # without text tower, and by another route to the same maps: one window as large as the image
    weights = ("MODEL.WEIGHTS", tmp_path / "out/export.safetensors")
    window = ("MODEL.SEMANTIC_SEGMENTOR.WINDOW", [256, 256], "MODEL.SEMANTIC_SEGMENTOR.STRIDE", [128, 128])
    again = run(*weights, *window, eval_only=True)
    assert again["sem_seg/mIoU"] == pytest.approx(results["sem_seg/mIoU"], rel=1e-4)
    assert again["sem_seg/pACC"] == pytest.approx(results["sem_seg/pACC"], rel=1e-4)
    windows = (
        "MODEL.SEMANTIC_SEGMENTOR.WINDOW",
        [128, 128],
        *window[2:],
        "MODEL.SEMANTIC_SEGMENTOR.FLIP",
        True,
    )
    assert 0 <= run(*weights, *windows, eval_only=True)["sem_seg/pACC"] <= 100
