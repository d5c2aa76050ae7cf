"""Two processes under torchrun (gloo) equal one process on the same global batch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.helpers import shares

EQUAL = [
    *("BatchNorm1d", "BatchNorm2d", "BatchNormAct2d", "BatchNorm2d, one process idle"),
    *("training", "training in parts", "Mask R-CNN", "ContrastiveCLIP", "MaskAdaptedCLIP"),
    *("CLIPSelf", "RegionCLIPBaseline"),
    *("a NaN on one process", "a signal to one process"),
]
# CLIP's temperature magnifies the rounding of sums in another order.
TOLERANCES = {"ContrastiveCLIP": 1e-4}


def test_two_processes_equal_one(tmp_path: Path) -> None:
    """One test, as starting processes takes longer than all that they do."""
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        folder.mkdir()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [*command, shares.__file__, str(two)], capture_output=True, text=True, env=environment, timeout=900
    )
    assert done.returncode == 0, done.stderr[-5000:]
    assert done.stdout.count("iter 6/6") == 1  # one process speaks for all
    shares.main(str(one))

    expected, found = torch.load(one / "shares.pth"), torch.load(two / "shares.pth")
    for name in EQUAL:
        assert expected[name].keys() == found[name].keys(), name
        for key, value in expected[name].items():
            assert difference(found[name][key], value) <= TOLERANCES.get(name, 1e-5), (name, key)
    control = expected["training without sync"]  # and they would not without synchronised norms
    assert max(difference(found["training without sync"][k], v) for k, v in control.items()) > 1e-3
    compare_runs(one / "run", two / "run")


def compare_runs(one: Path, two: Path) -> None:
    """What train_net wrote: losses, evaluations, the best and the last checkpoint."""
    names = [{p.name for p in f.iterdir() if p.name[:6] not in ("events", "log.tx")} for f in (one, two)]
    assert names[0] == names[1]
    lines = [(folder / "metrics.json").read_text().splitlines() for folder in (one, two)]
    assert len(lines[0]) == len(lines[1]) == 7 and "toy_steep/toy/error" in lines[1][-1]
    for rows in zip(*lines, strict=True):
        a, b = ({k: v for k, v in json.loads(row).items() if "time" not in k} for row in rows)
        assert b == pytest.approx(a, abs=1e-5)
    for name in ("model_best.pth", "model_final.pth"):
        a, b = (torch.load(folder / name)["model"] for folder in (one, two))
        assert max(difference(b[key], a[key]) for key in a) <= 1e-5
    assert len(torch.load(two / "model_final.pth")["random_states"]) == 2


def difference(a: Tensor, b: Tensor) -> float:
    """Largest difference, relative to the largest value."""
    return float((a.double() - b.double()).abs().max() / b.double().abs().max().clamp(min=0.1))
