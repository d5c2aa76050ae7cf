"""Two processes under torchrun (gloo) equal one process on the same global batch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import shares
import torch
from torch import Tensor

Results = dict[str, dict[str, Tensor]]


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return shares.results(folders(tmp_path_factory.mktemp("one")))


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Results:
    folder = folders(tmp_path_factory.mktemp("two"))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [*command, shares.__file__, folder], capture_output=True, text=True, env=environment, timeout=900
    )
    assert done.returncode == 0, done.stderr[-5000:]
    return torch.load(f"{folder}/shares.pth")


def folders(parent: Path) -> str:
    for name in "abc":
        (parent / name).mkdir()
    return str(parent)


NAMES = [
    *("BatchNorm1d", "BatchNorm2d", "BatchNormAct2d", "BatchNorm2d, one process idle"),
    *("training", "training in parts", "Mask R-CNN", "ContrastiveCLIP"),
]


@pytest.mark.parametrize("name", NAMES)
def test_equal(one: Results, two: Results, name: str) -> None:
    assert one[name].keys() == two[name].keys()
    for key, expected in one[name].items():
        assert difference(two[name][key], expected) <= 1e-5, key


def test_without_synchronised_norms_they_differ(one: Results, two: Results) -> None:
    """Negative control."""
    name = "training without sync"
    worst = max(difference(two[name][key], expected) for key, expected in one[name].items())
    assert worst > 1e-3


def difference(a: Tensor, b: Tensor) -> float:
    """Largest difference, relative to the largest value."""
    return float((a.double() - b.double()).abs().max() / b.double().abs().max().clamp(min=0.1))
