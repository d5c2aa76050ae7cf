"""MaskFormer and Mask2Former by tools/train_net.py: panoptic maps in, PQ, mIoU and AP out."""

import argparse
import json
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.usefixtures("small_shapes")


@pytest.mark.parametrize("name", ["maskformer_clip_rn", "mask2former_clip_rn"])
def test_trains_and_evaluates(name: str, tmp_path: Path) -> None:
    main = runpy.run_path(str(ROOT / "tools/train_net.py"))["main"]

    def run(*options: object, eval_only: bool = False) -> dict[str, float]:
        options = ("OUTPUT_DIR", tmp_path / "out", *options)
        return main(
            argparse.Namespace(
                config_file=str(ROOT / f"configs/shapes/{name}.yaml"),
                opts=list(map(str, options)),
                resume=False,
                eval_only=eval_only,
            )
        )

    thresholds = ("MODEL.MASK_FORMER.TEST.OBJECT_MASK_THRESHOLD", 0.0)
    results = run("SOLVER.MAX_ITER", 2, "SOLVER.IMS_PER_BATCH", 2, *thresholds)
    assert {"panoptic_seg/PQ", "sem_seg/mIoU"} <= set(results)
    assert ("segm/AP" in results) == (name == "mask2former_clip_rn")
    rows = [json.loads(line) for line in (tmp_path / "out/metrics.json").read_text().splitlines()]
    earlier = 1 if name == "maskformer_clip_rn" else 2
    logged = set().union(*rows)
    assert {f"loss_{kind}_{earlier}" for kind in ("ce", "mask", "dice")} <= logged
    assert f"loss_ce_{earlier + 1}" not in logged

    again = run("MODEL.WEIGHTS", tmp_path / "out/model_final.pth", *thresholds, eval_only=True)
    assert again["sem_seg/mIoU"] == pytest.approx(results["sem_seg/mIoU"], rel=1e-4)
    assert again["panoptic_seg/PQ"] == pytest.approx(results["panoptic_seg/PQ"], rel=1e-4)
