"""tools/train_net.py as users start it: alone, killed and resumed, interrupted, wrongly.

Under torchrun: tests/engine/test_processes.py.
"""

import argparse
import json
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import engine_toy

CONFIG = """
MODEL: {META_ARCHITECTURE: ToyNet, DEVICE: cpu}
INPUT: {MAPPER: ToyMapper}
DATASETS:
  TRAIN: ("toy",)
  TEST: ("toy",)
DATALOADER: {NUM_WORKERS: 2, ASPECT_RATIO_GROUPING: False}
SOLVER:
  {OPTIMIZER: AdamW, BASE_LR: 0.01, LR_SCHEDULER_NAME: WarmupCosineLR, WARMUP_ITERS: 2, IMS_PER_BATCH: 4,
  MAX_ITER: 12, CHECKPOINT_PERIOD: 5, EMA_DECAY: 0.9, LOG_PERIOD: 1}
TEST: {EVAL_PERIOD: 4}
SEED: 3
VERSION: 2
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "toy.yaml"
    path.write_text(CONFIG)
    return path


Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start(config: Path) -> Start:
    """Start train_net with the toy world: ``start(folder, KEY, VALUE, ..., options=())``."""

    def run(folder: Path, *settings: str, options: tuple[str, ...] = ()) -> "subprocess.Popen[str]":
        command = [sys.executable, engine_toy.__file__, *options, "--config-file", str(config)]
        command += ["OUTPUT_DIR", str(folder), *settings]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
        return subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
            start_new_session=True,
        )

    return run


def finish(process: "subprocess.Popen[str]", code: int = 0) -> str:
    output = process.communicate(timeout=900)[0]
    assert process.returncode == code, output
    return output


def here(config: Path, folder: Path, *settings: Any, **flags: bool) -> dict[str, float]:
    """The same in this process."""
    main = runpy.run_path(str(engine_toy.ROOT / "tools" / "train_net.py"))["main"]
    flags = {"resume": False, "eval_only": False, **flags}
    return main(
        argparse.Namespace(
            config_file=str(config), opts=["OUTPUT_DIR", str(folder), *map(str, settings)], **flags
        )
    )


def rows(folder: Path) -> list[dict[str, float]]:
    found = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    return [{k: v for k, v in row.items() if "time" not in k} for row in found]


def test_killed_and_resumed_equals_uninterrupted(config: Path, tmp_path: Path, start: Start) -> None:
    whole = here(config, tmp_path / "whole")
    output = finish(start(tmp_path / "killed", options=("--kill-at", "8")), code=-signal.SIGKILL)
    assert "iter 8/12" in output and len(rows(tmp_path / "killed")) == 8
    (tmp_path / "killed" / ".model_0000009.pth.12345678").mkdir()
    resumed = here(config, tmp_path / "killed", resume=True)
    assert resumed == pytest.approx(whole, abs=1e-5)
    assert len(rows(tmp_path / "whole")) == 13  # the last one is the final evaluation
    for a, b in zip(rows(tmp_path / "killed"), rows(tmp_path / "whole"), strict=True):
        assert a == pytest.approx(b, abs=1e-5)
    assert not list((tmp_path / "killed").glob(".model*"))
    evaluated = here(config, tmp_path / "killed", eval_only=True, resume=True)
    assert evaluated == pytest.approx(whole, abs=1e-5)


def test_ctrl_c_saves_and_resumes(config: Path, tmp_path: Path, start: Start) -> None:
    process = start(tmp_path / "run", "SOLVER.MAX_ITER", "1000000", "TEST.EVAL_PERIOD", "0")
    assert process.stdout is not None
    for line in process.stdout:
        if "iter 3/" in line:
            break
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: the loading processes get it, too
    output = finish(process, code=130)
    assert "--resume" in output and "Traceback" not in output, output
    last = (tmp_path / "run" / "last_checkpoint").read_text()
    done = int(last.removeprefix("model_").removesuffix(".pth")) + 1
    here(config, tmp_path / "run", "SOLVER.MAX_ITER", done + 2, "TEST.EVAL_PERIOD", 0, resume=True)
    assert [row["iteration"] for row in rows(tmp_path / "run")] == list(range(done + 2)) + [done + 2]


def test_a_second_run_does_not_overwrite_the_first(config: Path, tmp_path: Path) -> None:
    short = ("SOLVER.MAX_ITER", 2)
    here(config, tmp_path / "run", *short)
    first = (tmp_path / "run" / "model_final.pth").read_bytes()
    here(config, tmp_path / "run", *short, "SEED", 4)
    assert (tmp_path / "run" / "old_1" / "model_final.pth").read_bytes() == first
    assert (tmp_path / "run" / "model_final.pth").read_bytes() != first


@pytest.mark.parametrize(
    "settings, message",
    [
        (("SOLVER.BASELR", "1"), "unknown config key SOLVER.BASELR. Did you mean SOLVER.BASE_LR"),
        (("MODEL.WEIGHTS", "none.pth"), "weight file none.pth does not exist"),
        (("DATASETS.TRAIN", "('toys',)"), "dataset 'toys' is not registered"),
        (("OUTPUT_DIR", "/proc/run"), "OUTPUT_DIR /proc/run cannot be written"),
        (("DATASETS.TRAIN", "('toy_poisoned',)"), "loss_error = nan"),
    ],
)
def test_errors_are_said_in_a_line(
    config: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    settings: tuple[str, str],
    message: str,
) -> None:
    script = str(engine_toy.ROOT / "tools" / "train_net.py")
    command = [script, "--config-file", str(config), "OUTPUT_DIR", str(tmp_path / "run"), *settings]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit, match="1"):
        runpy.run_path(script, run_name="__main__")
    error = capsys.readouterr().err
    assert "\nerror: " in f"\n{error}" and message in error and "Traceback" not in error


def test_more_gpus_than_there_are(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = str(engine_toy.ROOT / "tools" / "train_net.py")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.setattr(sys, "argv", [script, "--num-gpus", "2", "--config-file", str(config)])
    with pytest.raises(SystemExit, match="1"):
        runpy.run_path(script, run_name="__main__")
    error = capsys.readouterr().err
    assert "--num-gpus is 2, but this machine has 0" in error and "torchrun" in error
