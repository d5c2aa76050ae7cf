"""Two processes under torchrun (gloo) equal one process on the same global batch."""

import json
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
def one_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    shares.main(folder := folders(tmp_path_factory.mktemp("one")))
    return folder


@pytest.fixture(scope="module")
def two_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = folders(tmp_path_factory.mktemp("two"))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [*command, shares.__file__, folder], capture_output=True, text=True, env=environment, timeout=900
    )
    assert done.returncode == 0, done.stderr[-5000:]
    assert done.stdout.count("iter 6/6") == 1  # one process speaks for all
    return folder


@pytest.fixture(scope="module")
def one(one_folder: str) -> Results:
    return torch.load(f"{one_folder}/shares.pth")


@pytest.fixture(scope="module")
def two(two_folder: str) -> Results:
    return torch.load(f"{two_folder}/shares.pth")


def folders(parent: Path) -> str:
    for name in "abcde":
        (parent / name).mkdir()
    return str(parent)


NAMES = [
    *("BatchNorm1d", "BatchNorm2d", "BatchNormAct2d", "BatchNorm2d, one process idle"),
    *("training", "training in parts", "Mask R-CNN", "ContrastiveCLIP"),
    *("a NaN on one process", "a signal to one process"),
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


def test_train_net(one_folder: str, two_folder: str) -> None:
    """Losses, evaluations, the best and the last checkpoint."""
    folders = [Path(folder, "run") for folder in (one_folder, two_folder)]
    names = [
        {p.name for p in folder.iterdir() if p.name[:6] not in ("events", "log.tx")} for folder in folders
    ]
    assert names[0] == names[1]
    lines = [(folder / "metrics.json").read_text().splitlines() for folder in folders]
    assert len(lines[0]) == len(lines[1]) == 7
    for one, two in zip(*lines, strict=True):
        a, b = ({k: v for k, v in json.loads(row).items() if "time" not in k} for row in (one, two))
        assert b == pytest.approx(a, abs=1e-5)
    assert "toy_steep/toy/error" in lines[1][-1]
    for name in ("model_best.pth", "model_final.pth"):
        a, b = (torch.load(folder / name)["model"] for folder in folders)
        assert max(difference(b[key], a[key]) for key in a) <= 1e-5
    assert len(torch.load(folders[1] / "model_final.pth")["random_states"]) == 2


def difference(a: Tensor, b: Tensor) -> float:
    """Largest difference, relative to the largest value."""
    return float((a.double() - b.double()).abs().max() / b.double().abs().max().clamp(min=0.1))
