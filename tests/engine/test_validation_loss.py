"""Loss on validation data, early stopping, and the loggers of a training."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from clipdense.engine.hooks import MetricRows
from clipdense.engine.loggers import LOGGERS, RunInfo
from clipdense.engine.loggers.writer import RunLoggers
from clipdense.engine.options import ConfigError
from clipdense.engine.trainer import Trainer
from clipdense.engine.validation_loss import check_loss_classes, loss_mode, mean_losses
from tests.helpers import engine_toy

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine.hooks import CallbackHook

Build = Callable[..., Trainer]
LOSS = ("TEST.LOSS.PERIOD", 2, "TEST.LOSS.DATASETS", ("toy",), "SOLVER.MAX_ITER", 6)
STOP = (
    "DATASETS.TEST",
    ("toy",),
    "TEST.EVAL_PERIOD",
    2,
    "TEST.BEST_METRIC",
    "toy/error",
    "TEST.BEST_MODE",
    "min",
)


def rows(trainer: Trainer) -> list[dict[str, float]]:
    path = Path(trainer.options.output_dir, "metrics.json")
    return [json.loads(row) for row in path.read_text().splitlines()]


def test_training_is_not_affected(build_trainer: Build) -> None:
    """Dropout, norm statistics and data order: the weights are the same to the last bit."""
    plain, watched = build_trainer(*LOSS[4:], folder="plain"), build_trainer(*LOSS, folder="watched")
    assert plain.train().keys() | {"validation/total_loss"} <= watched.train().keys()
    for name, value in plain.model.state_dict().items():
        torch.testing.assert_close(watched.model.state_dict()[name], value, rtol=0, atol=0)
    found = {row["iteration"]: row for row in rows(watched) if "validation/total_loss" in row}
    assert list(found) == [1, 3, 6]  # the last one after training
    row = found[3]
    parts = row["validation/loss_error"] + row["validation/loss_size"]
    assert row["validation/total_loss"] == pytest.approx(parts) and parts != row["total_loss"]
    assert not any("validation/total_loss" in row for row in rows(plain))


def test_every_image_once_and_always_the_same(build_trainer: Build) -> None:
    trainer = build_trainer(*LOSS)
    trainer.model.seen.clear()
    assert trainer.validation_batches is not None
    first, second = (mean_losses(trainer.model, trainer.validation_batches()) for _ in range(2))
    assert first == second
    seen = [i for batch in trainer.model.seen for i in batch]
    assert sorted(seen) == sorted([*range(engine_toy.SIZE)] * 2)


class Counter(nn.Module):
    """Counts its forwards, as RetinaNet's normaliser does, and drops half of its input."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.drop = nn.BatchNorm1d(2), nn.Dropout(0.5)
        self.calls = 1.0

    def forward(self, batch: list[Any]) -> dict[str, torch.Tensor]:
        assert self.training
        self.calls, self.last = self.calls + 1, 3.0
        return {"loss": self.drop(self.norm(torch.ones(4, 2))).mean()}


def test_state_is_restored() -> None:
    model = Counter()
    model.drop.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with loss_mode(model):
        assert torch.equal(model([])["loss"], model([])["loss"])
        assert model.norm.running_mean is not None
        model.norm.running_mean += 1
    assert (model.calls, hasattr(model, "last"), model.training, model.drop.training) == (
        1,
        False,
        True,
        False,
    )
    assert model.drop.p == 0.5
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_other_classes_are_refused(build_trainer: Build, catalogs: None, tmp_path: Path) -> None:
    DatasetCatalog.register("toy_other", engine_toy.records)
    MetadataCatalog.get("toy_other").set(thing_classes=["another thing"])
    cfg = engine_toy.toy_config(tmp_path, *LOSS[:2], "TEST.LOSS.DATASETS", ("toy_other",))
    with pytest.raises(ConfigError, match="toy_other needs the classes of toy"):
        check_loss_classes(cfg)
    check_loss_classes(engine_toy.toy_config(tmp_path, *LOSS))


def test_best_checkpoint_by_the_validation_loss(build_trainer: Build) -> None:
    best = ("TEST.BEST_METRIC", "validation/total_loss", "TEST.BEST_MODE", "min")
    trainer = build_trainer(*LOSS, *best)
    trainer.train()
    found = [row["validation/total_loss"] for row in rows(trainer) if "validation/total_loss" in row]
    record = json.loads(Path(trainer.options.output_dir, "model_best.json").read_text())
    assert record["value"] == min(found)


# The best of the evaluations, one every two iterations, is the second.
ERRORS = [5.0, 3.0, 4.0, 3.5, 3.5, 3.5, 1.0]


def with_errors(build_trainer: Build, patience: int = 2, **more: Any) -> Trainer:
    """A trainer that is given the errors of its evaluations."""
    trainer = build_trainer(*STOP, "TEST.EARLY_STOPPING.PATIENCE", patience, "SOLVER.MAX_ITER", 14, **more)
    trainer.evaluate = lambda model, final: {"toy": {"error": ERRORS[min(trainer.iter // 2, 6)]}}
    return trainer


def test_stops_early_and_stays_so(build_trainer: Build) -> None:
    trainer = with_errors(build_trainer)
    trainer.train()
    folder = Path(trainer.options.output_dir)
    assert [row["iteration"] for row in rows(trainer)][-1] == 8 and trainer.finished
    assert json.loads((folder / "results.json").read_text())["ended_by"] == "TEST.EARLY_STOPPING.PATIENCE"
    assert json.loads((folder / "model_best.json").read_text()) == {
        "metric": "toy/error",
        "value": 3.0,
        "iteration": 3,
    }
    assert (folder / "model_final.pth").is_file()
    again = with_errors(build_trainer, resume=True)
    again.train()
    assert [row["iteration"] for row in rows(again)][-1] == 8
    longer = with_errors(build_trainer, patience=3, resume=True)
    longer.train()
    assert [row["iteration"] for row in rows(longer)][-1] == 10


def test_a_killed_run_stops_where_it_would_have(build_trainer: Build) -> None:
    trainer = with_errors(build_trainer)

    def fail(trainer: Any) -> None:
        if trainer.iter == 5:
            raise RuntimeError("killed")

    trainer.register_hooks([CallbackHook(after_step=fail)])
    with pytest.raises(RuntimeError, match="killed"):
        trainer.train()
    resumed = with_errors(build_trainer, resume=True)
    resumed.train()
    assert [row["iteration"] for row in rows(resumed)] == list(range(9))


def test_patience_needs_a_metric(tmp_path: Path) -> None:
    cfg = engine_toy.toy_config(tmp_path, "TEST.EARLY_STOPPING.PATIENCE", 2)
    with pytest.raises(ConfigError, match="needs TEST.BEST_METRIC"):
        Trainer(cfg)


# ---- loggers


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("clipdense.engine.loggers.base.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install \"clipdense\[track\]\""):
        RunLoggers(RunInfo(tmp_path), [LOGGERS["wandb"]])


def test_a_failing_service_does_not_stop_the_training(
    build_trainer: Build, caplog: pytest.LogCaptureFixture
) -> None:
    class Failing(LOGGERS["tensorboard"]):  # type: ignore[misc]
        def write(self, scalars: Any, iteration: int) -> None:
            raise RuntimeError("no network")

    trainer = build_trainer("SOLVER.MAX_ITER", 3)
    hook = next(hook for hook in trainer._hooks if isinstance(hook, MetricRows))
    hook._loggers._kinds[1] = Failing
    trainer.train()
    assert "Failing: no network" in caplog.text and len(rows(trainer)) == 3


_ALL_LOGGERS = """
from pathlib import Path
from PIL import Image
from clipdense.engine.trainer import Trainer
from tests.helpers import engine_toy

folder = Path(sys.argv[1])
for resume, iterations in ((False, 4), (True, 6)):
    names = ("tensorboard", "wandb", "trackio")
    trainer = Trainer(engine_toy.toy_config(folder, "SOLVER.LOGGERS", names, "SOLVER.MAX_ITER", iterations))
    trainer.resume_or_load(resume)
    Image.new("RGB", (8, 8), "red").save(folder / "predictions_toy.png")
    trainer.train()

import sqlite3
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

board = EventAccumulator(str(folder)).Reload()
print("tensorboard", [event.step for event in board.Scalars("total_loss")], board.Tags()["images"])
database = next(Path(sys.argv[2]).glob("*.db"))
found = sqlite3.connect(database).execute("select step, metrics from metrics").fetchall()
steps = [(step, text if isinstance(text, str) else text.decode()) for step, text in found]
print("trackio", sorted({step for step, text in steps if "total_loss" in text}))
print("trackio pictures", any("predictions_toy" in text for _, text in steps))
"""


def test_every_logger_gets_rows_and_pictures(run_python: Callable[..., str], tmp_path: Path) -> None:
    """A run of four iterations, then resumed for two more, with the services offline."""
    run, tracked = tmp_path / "run", tmp_path / "trackio"
    run.mkdir()
    out = run_python(
        "import sys\n" + _ALL_LOGGERS,
        str(run),
        str(tracked),
        WANDB_MODE="offline",
        WANDB_SILENT="true",
        TRACKIO_DIR=str(tracked),
        HF_HUB_OFFLINE="1",
    )
    assert "tensorboard [0, 1, 2, 3, 4, 5] ['predictions_toy']" in out
    assert "trackio [0, 1, 2, 3, 4, 5]" in out and "trackio pictures True" in out
    assert list(run.glob("wandb/offline-run-*/*.wandb"))
    pictures = list(run.glob("wandb/offline-run-*/files/media/images/predictions_toy*.png"))
    assert len(pictures) == 2  # one of each part
