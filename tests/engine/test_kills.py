"""What a kill, a second run or a divergence leaves of a training."""

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from clipdense.engine.divergence import last_good_checkpoint
from clipdense.engine.lock import FolderLock, FolderLockedError
from clipdense.engine.options import ConfigError
from clipdense.engine.output import prepare_output_dir
from clipdense.engine.trainer import Trainer
from clipdense.files import WriteError

Build = Callable[..., Trainer]

SETTINGS = (
    *("SOLVER.MAX_ITER", 12, "SOLVER.CHECKPOINT_PERIOD", 4, "SOLVER.EMA_DECAY", 0.9),
    *("DATASETS.TEST", ("toy",), "TEST.EVAL_PERIOD", 4),
    *("TEST.BEST_METRIC", "toy/error", "TEST.BEST_MODE", "min"),
)


class Killed(BaseException):
    """Stand-in for SIGKILL: nothing catches it, nothing is saved."""


def metrics(trainer: Trainer) -> list[dict[str, Any]]:
    text = Path(trainer.options.output_dir, "metrics.json").read_text()
    rows = [json.loads(line) for line in text.splitlines()]
    return [{k: v for k, v in row.items() if "time" not in k and k != "eta_seconds"} for row in rows]


def in_child(action: Callable[[], None]) -> int:
    """Run a function in a forked process; return its exit status."""
    process = os.fork()
    if process == 0:
        try:
            action()
            os._exit(0)
        except BaseException:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


# ---- kills


@pytest.mark.parametrize("log_period", [1, 3])
def test_a_kill_in_an_evaluation_repeats_it(
    build_trainer: Build, monkeypatch: pytest.MonkeyPatch, log_period: int
) -> None:
    settings = (*SETTINGS, "SOLVER.LOG_PERIOD", log_period)
    whole = build_trainer(*settings, folder="whole")
    whole.train()

    killed = build_trainer(*settings)
    evaluate = killed.evaluate

    def kill_in_second(model: Any, final: bool) -> dict[str, Any]:
        if killed.iter == 7:
            raise Killed
        return evaluate(model, final)

    killed.evaluate = kill_in_second
    with pytest.raises(Killed):
        killed.train()
    assert killed.checkpointer.get_checkpoint_file().endswith("model_0000007.pth")

    resumed = build_trainer(*settings, resume=True)
    resumed.train()
    assert resumed.start_iter == 8
    assert metrics(resumed) == metrics(whole)
    records = [Path(t.options.output_dir, "model_best.json").read_text() for t in (resumed, whole)]
    assert records[0] == records[1]


def test_a_kill_before_the_first_checkpoint_doubles_no_metrics(build_trainer: Build) -> None:
    settings = ("SOLVER.MAX_ITER", 6, "SOLVER.CHECKPOINT_PERIOD", 4, "SOLVER.LOG_PERIOD", 1)
    whole = build_trainer(*settings, folder="whole")
    whole.train()
    killed = build_trainer(*settings)
    after_step = killed.after_step

    def kill_in_third() -> None:
        if killed.iter == 2:
            raise Killed
        after_step()

    killed.after_step = kill_in_third  # type: ignore[method-assign]
    with pytest.raises(Killed):
        killed.train()
    assert len(metrics(killed)) == 2

    resumed = build_trainer(*settings, resume=True)
    resumed.train()
    assert resumed.start_iter == 0
    assert metrics(resumed) == metrics(whole)


def test_an_evaluation_that_is_recorded_is_not_repeated(build_trainer: Build) -> None:
    first = build_trainer(*SETTINGS)
    first.train()
    first.checkpointer.tag_last_checkpoint("model_0000007.pth")
    resumed = build_trainer(*SETTINGS, resume=True)
    evaluated: list[int] = []
    evaluate = resumed.evaluate
    resumed.evaluate = lambda model, final: evaluated.append(resumed.iter) or evaluate(model, final)
    resumed.train()
    assert evaluated == [12]
    assert [row["iteration"] for row in metrics(resumed)] == list(range(13))


# ---- one run per folder


def test_a_second_run_in_the_folder_is_refused(tmp_path: Path) -> None:
    prepare_output_dir(str(tmp_path), keep=False)
    prepare_output_dir(str(tmp_path), keep=True)  # the same process

    def second_run() -> None:
        with pytest.raises(
            ConfigError, match=rf"OUTPUT_DIR {tmp_path} is in use by process {os.getppid()} on"
        ):
            prepare_output_dir(str(tmp_path), keep=True)

    assert in_child(second_run) == 0
    FolderLock(tmp_path, "OUTPUT_DIR").release()
    assert in_child(lambda: prepare_output_dir(str(tmp_path), keep=True) and None) == 0


def test_the_lock_of_a_killed_run_is_free_while_its_children_live(tmp_path: Path) -> None:
    read, write = os.pipe()
    run = os.fork()
    if run == 0:
        FolderLock(tmp_path, "OUTPUT_DIR").acquire()
        worker = os.fork()
        if worker == 0:
            os.read(os.pipe()[0], 1)  # for ever
        os.write(write, f"{worker}\n".encode())
        os._exit(9)
    worker = int(os.read(read, 20))
    os.waitpid(run, 0)
    try:
        os.kill(worker, 0)
        FolderLock(tmp_path, "OUTPUT_DIR").acquire()
        assert f"process {os.getpid()} on" in (tmp_path / "run.lock").read_text()
    finally:
        os.kill(worker, 9)
        FolderLock(tmp_path, "OUTPUT_DIR").release()


def test_training_releases_the_folder(build_trainer: Build) -> None:
    trainer = build_trainer("SOLVER.MAX_ITER", 1)

    def locked() -> None:
        FolderLock(trainer.options.output_dir, "OUTPUT_DIR").acquire()

    assert in_child(locked) == 1
    trainer.train()
    assert in_child(locked) == 0


def test_a_lock_names_its_owner(tmp_path: Path) -> None:
    FolderLock(tmp_path, "output folder").acquire()

    def second() -> None:
        with pytest.raises(FolderLockedError, match=f"output folder {tmp_path} is in use by process"):
            FolderLock(tmp_path, "output folder").acquire()

    assert in_child(second) == 0
    FolderLock(tmp_path, "output folder").release()


# ---- divergence


def test_a_check_of_the_model_names_iteration_images_and_checkpoint(build_trainer: Build) -> None:
    trainer = build_trainer("SOLVER.CHECKPOINT_PERIOD", 2, "SOLVER.IMS_PER_BATCH", 2)
    forward = trainer.model.forward

    def diverge(batch: Any) -> Any:
        losses = forward(batch)
        if trainer.model.training and trainer.iter == 4:
            raise FloatingPointError("Predicted boxes or scores contain Inf/NaN. Training has diverged.")
        return losses

    trainer.model.forward = diverge
    with pytest.raises(FloatingPointError) as e:
        trainer.train()
    message = str(e.value)
    assert "iteration 4: Predicted boxes or scores contain Inf/NaN" in message
    assert all(f"toy/{i:02d}.png" in message for i in trainer.model.seen[-1])
    # the checkpoint of iteration 3 holds the weights with which iteration 4 failed
    assert "last good checkpoint is" in message and "model_0000001.pth (model_0000003.pth may" in message
    assert trainer.checkpointer.get_checkpoint_file().endswith("model_0000001.pth")


def test_non_finite_weights_are_not_saved(build_trainer: Build) -> None:
    trainer = build_trainer("SOLVER.MAX_ITER", 4, "SOLVER.CHECKPOINT_PERIOD", 1, "SOLVER.WARMUP_ITERS", 0)
    step = trainer.optimizer.step

    def spoil(*args: Any, **kwargs: Any) -> None:
        step(*args, **kwargs)
        if trainer.iter == 2:
            with torch.no_grad():
                trainer.model.head.weight[0, 0] = float("inf")

    trainer.optimizer.step = spoil
    with pytest.raises(FloatingPointError, match="iteration 2: head.weight after the update"):
        trainer.train()
    saved = sorted(Path(trainer.options.output_dir).glob("model_*.pth"))
    assert [path.name for path in saved] == ["model_0000000.pth", "model_0000001.pth"]
    for path in saved:
        assert all(value.isfinite().all() for value in torch.load(path)["model"].values())


def test_last_good_checkpoint_is_from_before_the_loss_exploded(tmp_path: Path) -> None:
    for k in (1, 3, 5, 7):
        (tmp_path / f"model_{k:07d}.pth").touch()
    losses = [(1.0, 0), (1.2, 1), (0.9, 2), (1.1, 3), (1.0, 4), (1.0, 5), (500.0, 6), (1e9, 7)]
    good, suspects = last_good_checkpoint(str(tmp_path), 8, losses)
    assert good == tmp_path / "model_0000003.pth"
    assert suspects == ["model_0000005.pth", "model_0000007.pth"]
    assert last_good_checkpoint(str(tmp_path), 1, []) == (None, ["model_0000001.pth", *(
        f"model_{k:07d}.pth" for k in (3, 5, 7))])  # fmt: skip


# ---- the end of a training


def test_the_setting_that_ended_a_training_is_recorded(
    build_trainer: Build, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "clipdense"):
        trainer = build_trainer("SOLVER.MAX_ITER", 10_000, "SOLVER.MAX_SECONDS", 0.001)
        trainer.train()
    assert "Training ended after 1 of 10000 iterations by SOLVER.MAX_SECONDS 0.001" in caplog.text
    assert "--resume with a larger SOLVER.MAX_SECONDS" in caplog.text
    results = json.loads(Path(trainer.options.output_dir, "results.json").read_text())
    assert results["ended_by"] == "SOLVER.MAX_SECONDS"

    longer = build_trainer("SOLVER.MAX_ITER", 3, resume=True)
    longer.train()
    results = json.loads(Path(trainer.options.output_dir, "results.json").read_text())
    assert longer.iter == 3 and results["ended_by"] == "SOLVER.MAX_ITER"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_metrics_on_a_full_disk_neither_end_a_training_nor_hide_its_error(
    build_trainer: Build, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = build_trainer("SOLVER.MAX_ITER", 2)
    Path(trainer.options.output_dir, "metrics.json").symlink_to("/dev/full")
    trainer.save = lambda *args, **kwargs: (_ for _ in ()).throw(  # type: ignore[method-assign]
        WriteError("cannot write model_final.pth")
    )
    with pytest.raises(WriteError, match="model_final.pth"):
        trainer.train()
    assert "cannot write metrics" in caplog.text and "No space left" in caplog.text
