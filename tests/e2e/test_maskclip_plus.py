"""MaskCLIP+ by tools/train_net.py: training, the exported segmentor, and resuming in self-training."""

import argparse
import json
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.usefixtures("small_shapes")


def test_trains_exports_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLIPDENSE_CACHE", str(tmp_path / "cache"))
    main = runpy.run_path(str(ROOT / "tools/train_net.py"))["main"]

    def run(*options: object, eval_only: bool = False, resume: bool = False) -> dict[str, float]:
        return main(
            argparse.Namespace(
                config_file=str(ROOT / "configs/shapes/maskclip_plus_zero_shot_rn.yaml"),
                opts=list(map(str, ("OUTPUT_DIR", tmp_path / "out", *options))),
                resume=resume,
                eval_only=eval_only,
            )
        )

    short = ("SOLVER.IMS_PER_BATCH", 2, "SOLVER.LOG_PERIOD", 1, "MODEL.MASKCLIP_PLUS.SELF_TRAINING_FROM", 2)
    results = run("SOLVER.MAX_ITER", 1, *short)
    assert 0 <= results["sem_seg/mIoU"] <= 100
    alone = ("MODEL.META_ARCHITECTURE", "WindowedSemanticSegmentor")
    weights = ("MODEL.WEIGHTS", tmp_path / "out/export.safetensors")
    again = run(*alone, *weights, eval_only=True)
    assert again["sem_seg/pACC"] == pytest.approx(results["sem_seg/pACC"], rel=1e-4)
    run("SOLVER.MAX_ITER", 2, *short, resume=True)
    rows = [json.loads(line) for line in (tmp_path / "out/metrics.json").read_text().splitlines()]
    assert {row["iteration"] for row in rows if "total_loss" in row} == {0, 1}
