"""Adapting a CLIP to masked crops by tools/train_net.py: masks with nouns in, a CLIP and its accuracy out."""

import argparse
import runpy
from pathlib import Path

import pytest

from clipdense.clip import load_clip
from clipdense.clip.mask_prompts import load_mask_prompts

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.usefixtures("small_shapes")


def test_one_run_starts_from_what_the_other_exported(tmp_path: Path) -> None:
    main = runpy.run_path(str(ROOT / "tools/train_net.py"))["main"]

    def run(name: str, *options: object, eval_only: bool = False) -> dict[str, float]:
        options = ("OUTPUT_DIR", tmp_path / name, "SEED", 1, "DATALOADER.NUM_WORKERS", 0, *options)
        return main(
            argparse.Namespace(
                config_file=str(ROOT / f"configs/shapes/adapt_{name}_gt.yaml"),
                opts=list(map(str, options)),
                resume=False,
                eval_only=eval_only,
            )
        )

    short = ("SOLVER.MAX_ITER", 2, "SOLVER.IMS_PER_BATCH", 4)
    before = run("ft", eval_only=True)
    unmasked = run("ft", "MODEL.MASK_ADAPTED_CLIP.CROP.MASKED", False, eval_only=True)
    assert before["mask_classification/n"] == unmasked["mask_classification/n"] > 5
    assert before["mask_classification/top1"] > 50
    assert "mask_classification/mIoU" in before
    tuned = run("mpt", *short)
    file = tmp_path / "mpt" / "export.safetensors"
    assert load_clip("shapes-vit", file).visual is not None and load_mask_prompts(file) is not None
    again = run("ft", "MODEL.CLIP.PRETRAINED", file, eval_only=True)
    assert again == pytest.approx(tuned, nan_ok=True)
    run("ft", *short, "MODEL.CLIP.PRETRAINED", file)
    kept, first = (load_mask_prompts(tmp_path / name / "export.safetensors") for name in ("ft", "mpt"))
    assert kept is not None and first is not None and kept.prompts.equal(first.prompts)
