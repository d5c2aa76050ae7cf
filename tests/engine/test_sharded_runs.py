"""A run with FSDP: its losses, its checkpoints, and resuming it on another number of processes."""

import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from clipdense.checkpoint import CheckpointError, read_checkpoint
from clipdense.checkpoint.shards import read_shards
from clipdense.engine.trainer import Trainer
from tests.helpers.engine_toy import toy_config
from tests.helpers.processes import run_processes

SETTINGS = (
    *(
        "MODEL.TOY.DROPOUT",
        0.0,
        "MODEL.TOY.NORM",
        False,
        "SOLVER.EMA_DECAY",
        0.5,
        "SOLVER.CHECKPOINT_PERIOD",
        3,
    ),
    *("SOLVER.CLIP_GRADIENTS.ENABLED", True, "SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "full_model"),
    *("SOLVER.CLIP_GRADIENTS.CLIP_VALUE", 0.5, "DATASETS.TEST", ("toy",), "TEST.EVAL_PERIOD", 4),
    *("TEST.BEST_METRIC", "toy/error", "TEST.BEST_MODE", "min"),
)
FSDP = ("SOLVER.PARALLEL", "fsdp")


@pytest.fixture(autouse=True)
def without_curve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clipdense.visualization.curves.draw_curve", lambda *paths: None)


def train(folder: Path, resume: bool, *overrides: Any) -> dict[str, float]:
    """Train the toy; returns the metrics of the final evaluation."""
    folder.mkdir(exist_ok=True)
    torch.manual_seed(0)
    trainer = Trainer(toy_config(folder, *SETTINGS, *overrides))
    trainer.resume_or_load(resume)
    return trainer.train()


def rows(folder: Path) -> list[dict[str, float]]:
    """Rows of metrics.json without times."""
    lines = (folder / "metrics.json").read_text().splitlines()
    return [{k: v for k, v in json.loads(x).items() if "time" not in k and k != "eta_seconds"} for x in lines]


def assert_equal(found: Path, expected: Path) -> None:
    a, b = rows(found), rows(expected)
    assert len(a) == len(b) and "toy/error" in b[-1] and "grad_norm" in b[0]
    for x, y in zip(a, b, strict=True):
        assert x == pytest.approx(y, abs=1e-5)
    for name in ("model_final.pth", "model_best.pth", "export.safetensors"):
        states = [read_checkpoint(folder / name).state for folder in (found, expected)]
        assert states[0].keys() == states[1].keys()
        for key, value in states[1].items():
            torch.testing.assert_close(states[0][key], value, atol=1e-5, rtol=1e-5)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run in one process, and the same with FSDP in four."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("clipdense.visualization.curves.draw_curve", lambda *paths: None)
        train(folder / "one", False)
        run_processes(train, 4, folder / "processes", folder / "four", False, *FSDP)
    yield folder


def copy(source: Path, target: Path, last: str) -> Path:
    """Copy a run as a kill after the checkpoint ``last`` leaves it."""
    target.mkdir()
    for name in ("metrics.json", "model_best.pth", "model_best.json", last):
        (target / name).write_bytes((source / name).read_bytes())
    shards = (source / last).with_suffix(".shards")
    if shards.is_dir():
        (target / shards.name).symlink_to(shards)
    (target / "last_checkpoint").write_text(last)
    return target


def test_four_processes_equal_one(runs: Path) -> None:
    assert_equal(runs / "four", runs / "one")
    losses = [row["total_loss"] for row in rows(runs / "one")[:-1]]
    assert max(losses) > 1.1 * min(losses)
    state = torch.load(runs / "four" / "model_0000002.pth")
    assert "model" not in state and state["shards"] == "model_0000002.shards"
    assert len(list((runs / "four" / "model_0000002.shards").glob("*.distcp"))) == 4


@pytest.mark.parametrize("size", [2, 3])
def test_resumes_on_another_number_of_processes(runs: Path, tmp_path: Path, size: int) -> None:
    folder = copy(runs / "four", tmp_path / "run", "model_0000002.pth")
    batch = ("SOLVER.IMS_PER_BATCH", 4) if size == 2 else ("SOLVER.IMS_PER_BATCH", 6)
    run_processes(train, size, tmp_path / "processes", folder, True, *FSDP, *batch)
    if size == 2:
        assert_equal(folder, runs / "one")
    else:  # another batch: the same state, other data
        assert len(rows(folder)) == len(rows(runs / "one"))


@pytest.mark.parametrize("settings", [(), FSDP], ids=["ddp", "fsdp"])
def test_resumes_in_one_process(runs: Path, tmp_path: Path, settings: tuple[str, ...]) -> None:
    folder = copy(runs / "four", tmp_path / "run", "model_0000005.pth")
    train(folder, True, *settings)
    assert_equal(folder, runs / "one")


def test_shards_of_another_optimizer_are_refused(runs: Path, tmp_path: Path) -> None:
    folder = copy(runs / "four", tmp_path / "run", "model_0000002.pth")
    with pytest.raises(CheckpointError, match="its optimizer does not match this config"):
        train(folder, True, "SOLVER.PARAM_GROUPS", [{"MATCH": "head", "FREEZE": True}])


def resume_with_fsdp(folder: Path) -> str:
    try:
        train(folder, True, *FSDP)
    except CheckpointError as e:
        return str(e)
    return ""


def test_a_checkpoint_of_ddp_is_not_resumed_with_fsdp(runs: Path, tmp_path: Path) -> None:
    folder = copy(runs / "one", tmp_path / "run", "model_0000002.pth")
    messages = run_processes(resume_with_fsdp, 2, tmp_path / "processes", folder)
    assert all("was saved with SOLVER.PARALLEL ddp: continue with ddp" in m for m in messages)


def test_old_shards_are_removed(tmp_path: Path) -> None:
    run_processes(
        train, 2, tmp_path / "processes", tmp_path / "run", False, *FSDP, "SOLVER.CHECKPOINT_KEEP", 1
    )
    names = {path.name for path in (tmp_path / "run").glob("model_0*")}
    assert names == {"model_0000005.pth", "model_0000005.shards"}
    assert not list((tmp_path / "run").glob(".model*"))
    train(tmp_path / "run", False)  # a new run moves them away
    assert (tmp_path / "run" / "old_1" / "model_final.shards").is_dir()


def test_a_checkpoint_needs_its_shards(runs: Path, tmp_path: Path) -> None:
    (tmp_path / "model_final.pth").write_bytes((runs / "four" / "model_final.pth").read_bytes())
    with pytest.raises(CheckpointError, match="folder model_final.shards, which is not beside it"):
        read_checkpoint(tmp_path / "model_final.pth")


class Payload:
    def __reduce__(self) -> Any:
        return print, ("code ran",)


def test_the_index_of_shards_runs_no_code(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Payload()))
    with pytest.raises(pickle.UnpicklingError, match="names builtins.print"):
        read_shards(tmp_path, "model.")
    assert "code ran" not in capsys.readouterr().out
