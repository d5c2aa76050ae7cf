"""The benchmark suite of CAT-Seg on a nano CLIP."""

import argparse
from pathlib import Path

import pytest
from benchmarks import load_suite

CONFIG = Path(__file__).parents[2] / "configs/shapes/catseg_vit.yaml"


def test_rows() -> None:
    suite = load_suite("catseg")
    parser = argparse.ArgumentParser()
    suite.add_arguments(parser)
    parser.set_defaults(device="cpu")
    options = ["--config-file", str(CONFIG), "--size", "96", "96", "--classes", "30"]
    args = parser.parse_args([*options, "--topk", "1", "--present", "3", "--flops-only"])
    rows = {row.name: row for row in suite.rows(args)}
    assert list(rows) == ["catseg/k847_extra_gb", "catseg/inference_flops", "catseg/early_rejection_flops"]
    memory = rows["catseg/k847_extra_gb"]
    assert 0 < memory.ours < 0.5 and memory.values["peak_gb"] > memory.values["clip_gb"]
    assert rows["catseg/early_rejection_flops"].ratio < 1 < rows["catseg/inference_flops"].ratio

    parser.set_defaults(device="meta")
    args = parser.parse_args([*options, "--rows", "k847", "floor", "--flops-only"])
    for row in suite.rows(args):  # the same figures, without computing
        assert (row.ours, row.other) == pytest.approx((rows[row.name].ours, rows[row.name].other), rel=1e-6)
