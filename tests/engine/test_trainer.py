import errno
import json
import math
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from clipdense.checkpoint import CheckpointError
from clipdense.engine import trainer as trainer_module
from clipdense.engine.trainer import Trainer
from tests.helpers import engine_toy

from detectron2.engine.hooks import CallbackHook

Build = Callable[..., Trainer]


def rows(trainer: Trainer) -> list[dict[str, float]]:
    return [
        json.loads(row) for row in Path(trainer.options.output_dir, "metrics.json").read_text().splitlines()
    ]


def losses(trainer: Trainer) -> list[float]:
    return [row["total_loss"] for row in rows(trainer) if "total_loss" in row]


def files(trainer: Trainer, suffix: str = ".pth") -> list[str]:
    return sorted(p.name for p in Path(trainer.options.output_dir).iterdir() if p.suffix == suffix)


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in trainer.model.state_dict().items()}


def at(iteration: int, do: Callable[[Trainer], Any]) -> CallbackHook:
    """A hook that runs ``do`` after an iteration."""
    return CallbackHook(after_step=lambda trainer: do(trainer) if trainer.iter == iteration else None)


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=0, msg=name)


# ---- training


def test_trains(build_trainer: Build) -> None:
    trainer = build_trainer("SOLVER.MAX_ITER", 60, "SOLVER.CHECKPOINT_PERIOD", 20, "MODEL.TOY.DROPOUT", 0.0)
    trainer.train()
    found = rows(trainer)
    assert [row["iteration"] for row in found] == list(range(60))
    assert {"total_loss", "loss_error", "loss_size", "lr", "grad_norm", "time", "data_time"} <= found[
        5
    ].keys()
    assert found[9]["total_loss"] == pytest.approx(found[9]["loss_error"] + found[9]["loss_size"])
    assert sum(losses(trainer)[-10:]) < 0.8 * sum(losses(trainer)[:10])
    assert files(trainer) == ["model_0000019.pth", "model_0000039.pth", "model_final.pth"]
    assert trainer.checkpointer.get_checkpoint_file().endswith("model_final.pth")
    assert files(trainer, ".safetensors") == ["export.safetensors"]
    assert list(Path(trainer.options.output_dir).glob("events.out.tfevents.*"))


def test_one_epoch_shows_each_image_once(build_trainer: Build) -> None:
    trainer = build_trainer("SOLVER.MAX_ITER", 3)
    trainer.train()
    assert sorted(i for batch in trainer.model.seen for i in batch) == list(range(engine_toy.SIZE))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_mixed_precision(build_trainer: Build, dtype: str) -> None:
    settings = ("SOLVER.MAX_ITER", 20, "MODEL.TOY.DROPOUT", 0.0)
    exact = build_trainer(*settings, folder="exact")
    exact.train()
    trainer = build_trainer(*settings, "SOLVER.AMP.ENABLED", True, "SOLVER.AMP.DTYPE", dtype)
    types = []
    trainer.model.trunk[0].register_forward_hook(lambda m, i, o: types.append(o.dtype))
    trainer.train()
    assert set(types) == {getattr(torch, dtype)}
    assert losses(trainer) != losses(exact)
    assert losses(trainer) == pytest.approx(losses(exact), rel=0.05)
    assert trainer.scaler.is_enabled() == (dtype == "float16")
    assert all(p.dtype == torch.float32 for p in trainer.model.parameters())


def test_overflow_under_loss_scaling_skips_the_step(build_trainer: Build) -> None:
    trainer = build_trainer("SOLVER.AMP.ENABLED", True, "SOLVER.MAX_ITER", 4)
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**120)
    trainer.train()
    assert trainer.scaler.get_scale() < 2.0**120


@pytest.mark.parametrize(
    "clip", [(), ("SOLVER.CLIP_GRADIENTS.ENABLED", True, "SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "full_model")]
)
def test_accumulation_equals_the_whole_batch(build_trainer: Build, clip: tuple[Any, ...]) -> None:
    settings = ("MODEL.TOY.DROPOUT", 0.0, "MODEL.TOY.NORM", False, *clip)
    whole = build_trainer(*settings, folder="whole")
    whole.train()
    parts = build_trainer(*settings, "SOLVER.ACCUMULATION_STEPS", 3)  # parts of 2 and 2
    calls = []
    parts.model.register_forward_hook(lambda m, i, o: calls.append(len(i[0])))
    parts.train()
    assert calls == [2, 2] * 8
    assert losses(parts) == pytest.approx(losses(whole), abs=1e-6)
    for name, value in weights(whole).items():
        torch.testing.assert_close(weights(parts)[name], value, rtol=0, atol=1e-5)


def test_uneven_parts_weigh_as_much_as_their_images(build_trainer: Build) -> None:
    settings = ("MODEL.TOY.DROPOUT", 0.0, "MODEL.TOY.NORM", False, "SOLVER.IMS_PER_BATCH", 5)
    whole = build_trainer(*settings, folder="whole")
    whole.train()
    parts = build_trainer(*settings, "SOLVER.ACCUMULATION_STEPS", 2)  # parts of 3 and 2
    parts.train()
    assert losses(parts) == pytest.approx(losses(whole), abs=1e-6)


def test_average_of_weights_is_evaluated_and_saved(build_trainer: Build) -> None:
    trainer = build_trainer("SOLVER.EMA_DECAY", 0.9, "DATASETS.TEST", ("toy",), "TEST.EVAL_PERIOD", 4)
    evaluated = []
    evaluate = trainer.evaluate
    trainer.evaluate = lambda model, final: evaluated.append(weights(trainer)) or evaluate(model, final)
    online: list[dict[str, torch.Tensor]] = []
    trainer.register_hooks([at(7, lambda t: online.append(weights(t)))])
    trainer.train()
    assert len(evaluated) == 2
    state = torch.load(trainer.checkpointer.get_checkpoint_file())
    assert_same(state["model"], evaluated[1])
    assert_same({**state["model"], **state["online"]}, online[0])
    assert not torch.equal(state["model"]["head.weight"], state["online"]["head.weight"])
    assert_same(weights(trainer), online[0])


def test_frozen_parts_stay(build_trainer: Build) -> None:
    trainer = build_trainer("SOLVER.PARAM_GROUPS", [{"MATCH": "^trunk", "FREEZE": True}])
    before = weights(trainer)
    trainer.train()
    after = weights(trainer)
    for name in before:  # running statistics of the frozen norm included
        assert torch.equal(before[name], after[name]) == name.startswith("trunk"), name


def test_progress_bar_on_a_terminal(
    build_trainer: Build, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    trainer = build_trainer("SOLVER.MAX_ITER", 30)
    trainer.train()
    shown = capsys.readouterr().err.split("\r")[-1]
    assert shown.startswith("100%|") and "iter 30/30" in shown
    assert f"total_loss {losses(trainer)[-1]:.4g}" in shown and "lr" in shown


# ---- the wall-clock cap


def test_time_cap_ends_training_with_the_schedule(
    build_trainer: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr(trainer_module.time, "monotonic", lambda: now[0])
    trainer = build_trainer(
        "SOLVER.MAX_ITER", 10_000, "SOLVER.MAX_SECONDS", 20.0, "SOLVER.CHECKPOINT_PERIOD", 5
    )

    class Clock(CallbackHook):
        def before_step(self) -> None:
            now[0] += 1.0

    trainer.register_hooks([Clock()])
    trainer.train()
    assert trainer.max_iter == 20 and len(losses(trainer)) == 20
    lrs = [row["lr"] for row in rows(trainer) if "lr" in row]
    assert max(lrs) > 0.009 and lrs[-1] < 0.0005 and lrs[2:] == sorted(lrs[2:], reverse=True)
    assert files(trainer)[-1] == "model_final.pth" and "model_0000019.pth" not in files(trainer)
    again = build_trainer("SOLVER.MAX_ITER", 10_000, "SOLVER.MAX_SECONDS", 20.0, resume=True)
    again.train()
    assert again.iter == 20 and len(losses(again)) == 20  # a finished run is not trained on
    longer = build_trainer("SOLVER.MAX_ITER", 10_000, "SOLVER.MAX_SECONDS", 30.0, resume=True)
    longer.register_hooks([Clock()])
    longer.train()
    assert len(losses(longer)) == 30


# ---- resuming

RESUME = (
    *("SOLVER.MAX_ITER", 12, "SOLVER.CHECKPOINT_PERIOD", 5, "SOLVER.EMA_DECAY", 0.9),
    *(
        "DATASETS.TEST",
        ("toy",),
        "TEST.EVAL_PERIOD",
        3,
        "TEST.BEST_METRIC",
        "toy/error",
        "TEST.BEST_MODE",
        "min",
    ),
)


@pytest.mark.parametrize("amp", [(), ("SOLVER.AMP.ENABLED", True)])
def test_resumed_equals_uninterrupted(build_trainer: Build, amp: tuple[Any, ...]) -> None:
    whole = build_trainer(*RESUME, *amp, folder="whole")
    whole.train()

    class Killed(BaseException):
        """Like kill -9: nothing is caught, nothing saved."""

    def kill(trainer: Trainer) -> None:
        raise Killed

    first = build_trainer(*RESUME, *amp)
    first.register_hooks([at(7, kill)])
    with pytest.raises(Killed):
        first.train()
    assert files(first) == ["model_0000004.pth", "model_best.pth"] and len(losses(first)) == 8
    torch.rand(11)  # another process begins with other random numbers
    second = build_trainer(*RESUME, *amp, resume=True)
    assert second.start_iter == 5
    second.train()
    assert second.model.seen == whole.model.seen[5:]
    assert losses(second) == losses(whole)
    drop = ("time", "data_time", "eta_seconds")
    clean = [[{k: v for k, v in row.items() if k not in drop} for row in rows(t)] for t in (second, whole)]
    assert clean[0] == clean[1]
    assert_same(weights(second), weights(whole))
    assert_same(second.ema.average, whole.ema.average)
    records = [Path(t.options.output_dir, "model_best.json").read_text() for t in (second, whole)]
    assert records[0] == records[1]


def test_without_the_random_state_it_would_not(build_trainer: Build) -> None:
    """Negative control: dropout does draw from what a checkpoint keeps."""
    whole = build_trainer(*RESUME, folder="whole")
    whole.train()
    whole.checkpointer.tag_last_checkpoint("model_0000004.pth")
    first = losses(whole)
    resumed = build_trainer(*RESUME, folder="whole", resume=True)
    resumed.resumed.random_state = None
    resumed.train()
    assert losses(resumed)[:5] == first[:5] and losses(resumed) != first


def test_resume_without_a_checkpoint_begins(build_trainer: Build) -> None:
    trainer = build_trainer("SOLVER.MAX_ITER", 2, resume=True)
    assert trainer.start_iter == 0
    trainer.train()


def test_resume_with_another_model_or_optimizer_is_an_error(build_trainer: Build) -> None:
    build_trainer("SOLVER.MAX_ITER", 1).train()
    with pytest.raises(CheckpointError, match="model_final.pth does not fit(.|\n)*trunk.1.weight"):
        build_trainer("MODEL.TOY.NORM", False, resume=True)
    with pytest.raises(CheckpointError, match="model_final.pth: its optimizer does not match"):
        build_trainer("SOLVER.PARAM_GROUPS", [{"MATCH": "head", "LR": 0.5}], resume=True)


def test_begins_from_weights(build_trainer: Build) -> None:
    first = build_trainer("SOLVER.EMA_DECAY", 0.9, folder="first")
    first.train()
    path = first.checkpointer.get_checkpoint_file()
    second = build_trainer("MODEL.WEIGHTS", path, "SOLVER.EMA_DECAY", 0.5)
    assert second.start_iter == 0
    assert_same(second.model.state_dict(), torch.load(path)["model"])
    assert_same(
        second.ema.average, {k: v for k, v in torch.load(path)["model"].items() if k in second.ema.average}
    )


# ---- faults


def test_nan_loss_names_term_and_images(build_trainer: Build) -> None:
    trainer = build_trainer("DATASETS.TRAIN", ("toy_poisoned",), "SOLVER.CHECKPOINT_PERIOD", 1)
    with pytest.raises(FloatingPointError) as e:
        trainer.train()
    message, batch = str(e.value), trainer.model.seen[-1]
    assert "loss_error = nan" in message and "loss_size = nan" not in message and 7 in batch
    assert all(f"toy/{i:02d}.png" in message for i in batch)
    assert not any(f"toy/{i:02d}.png" in message for i in set(range(12)) - set(batch))
    done = len(trainer.model.seen) - 1
    assert f"iteration {done}" in message
    assert files(trainer) == [f"model_{i:07d}.pth" for i in range(done)]  # and none after
    if done:
        assert f"model_{done - 1:07d}.pth" in message
        saved = torch.load(trainer.checkpointer.get_checkpoint_file())["model"]
        assert all(v.isfinite().all() for v in saved.values())


def test_nan_gradient_of_a_finite_loss(build_trainer: Build) -> None:
    trainer = build_trainer("DATASETS.TRAIN", ("toy_steep",))
    with pytest.raises(FloatingPointError, match="the gradient of head.weight(.|\n)*toy/07.png"):
        trainer.train()
    assert all(v.isfinite().all() for v in weights(trainer).values())
    assert files(trainer) == []


def test_gradients_that_overflow_at_any_scale(build_trainer: Build) -> None:
    trainer = build_trainer(
        "DATASETS.TRAIN",
        ("toy_steep",),
        "SOLVER.AMP.ENABLED",
        True,
        "SOLVER.IMS_PER_BATCH",
        12,
        "SOLVER.MAX_ITER",
        100,
    )
    with pytest.raises(FloatingPointError, match="the gradient of"):
        trainer.train()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_save_and_end(build_trainer: Build, number: int) -> None:
    before = signal.getsignal(number)
    trainer = build_trainer(*RESUME, folder="whole")
    trainer.train()
    stopped = build_trainer(*RESUME)
    stopped.register_hooks([at(6, lambda t: os.kill(os.getpid(), number))])
    with pytest.raises(SystemExit) as e:
        stopped.train()
    assert e.value.code == 128 + number
    assert files(stopped)[1] == "model_0000006.pth" and signal.getsignal(number) is before
    resumed = build_trainer(*RESUME, resume=True)
    resumed.train()
    assert losses(resumed) == losses(trainer)


def test_the_second_signal_acts_at_once(build_trainer: Build) -> None:
    trainer = build_trainer()
    before = signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # ignored where tests run in the background

    def twice(t: Trainer) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    trainer.register_hooks([at(3, twice)])
    try:
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
    finally:
        signal.signal(signal.SIGINT, before)


def fill_disk(monkeypatch: pytest.MonkeyPatch, until: Callable[[], bool] = lambda: False) -> None:
    save = torch.save

    def full(data: Any, file: Any) -> None:
        if until():
            return save(data, file)
        file.write(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(torch, "save", full)


def test_full_disk_during_training(
    build_trainer: Build, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = build_trainer("SOLVER.CHECKPOINT_PERIOD", 3)
    trainer.register_hooks([at(3, lambda t: fill_disk(monkeypatch, until=lambda: t.iter > 6))])
    trainer.train()
    assert files(trainer) == ["model_0000002.pth", "model_final.pth"]
    assert "No space left on device" in caplog.text and "model_0000002.pth" in caplog.text
    assert not list(Path(trainer.options.output_dir).glob(".*"))


def test_full_disk_at_the_end(build_trainer: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = build_trainer("SOLVER.CHECKPOINT_PERIOD", 3)
    trainer.register_hooks([at(6, lambda t: fill_disk(monkeypatch))])
    with pytest.raises(
        CheckpointError, match="model_final.pth: No space left(.|\n)*last good.*model_0000005.pth"
    ):
        trainer.train()
    assert trainer.checkpointer.get_checkpoint_file().endswith("model_0000005.pth")


def test_what_fails_between_iterations_costs_no_iteration(build_trainer: Build) -> None:
    trainer = build_trainer("DATASETS.TEST", ("toy",), "TEST.EVAL_PERIOD", 5)

    def broken(model: nn.Module, final: bool) -> dict[str, Any]:
        raise KeyError("no such output")

    trainer.evaluate = broken
    with pytest.raises(KeyError, match="no such output"):
        trainer.train()
    assert files(trainer) == ["model_0000004.pth"]


# ---- evaluation


def test_best_checkpoint(build_trainer: Build, caplog: pytest.LogCaptureFixture) -> None:
    settings = ("DATASETS.TEST", ("toy",), "TEST.EVAL_PERIOD", 2)
    trainer = build_trainer(*settings, "TEST.BEST_METRIC", "toy/error", "TEST.BEST_MODE", "min")
    values, states = iter([3.0, 1.0, math.nan, 2.0]), []

    def evaluate(model: nn.Module, final: bool) -> dict[str, Any]:
        states.append(weights(trainer))
        return {"toy": {"error": next(values)}}

    trainer.evaluate = evaluate
    assert trainer.train() == {"toy/error": 2.0}
    assert_same(torch.load(Path(trainer.options.output_dir, "model_best.pth"))["model"], states[1])
    record = json.loads(Path(trainer.options.output_dir, "model_best.json").read_text())
    assert record == {"metric": "toy/error", "value": 1.0, "iteration": 3}
    assert trainer.checkpointer.get_checkpoint_file().endswith("model_final.pth")
    assert [row["toy/error"] for row in rows(trainer) if "toy/error" in row][:2] == [3.0, 1.0]

    unknown = build_trainer(*settings, "TEST.BEST_METRIC", "bbox/AP", folder="unknown")
    unknown.train()
    assert "TEST.BEST_METRIC 'bbox/AP' is not among the metrics: toy/error" in caplog.text
