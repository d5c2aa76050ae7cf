"""What happens around iterations: checkpoints, evaluation, and telling the user."""

import datetime
import json
import logging
import math
import operator
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from clipdense.checkpoint import CheckpointError
from clipdense.engine.options import TrainerOptions
from clipdense.files import WriteError, write_text

from detectron2.engine.hooks import IterationTimer
from detectron2.engine.train_loop import HookBase
from detectron2.utils import comm
from detectron2.utils.events import EventStorage, EventWriter, JSONWriter, TensorboardXWriter

__all__ = [
    "BestCheckpoint",
    "PeriodicCheckpoint",
    "PeriodicEvaluation",
    "Progress",
    "Writers",
    "default_hooks",
]

logger = logging.getLogger(__name__)


def default_hooks(options: TrainerOptions) -> list[HookBase]:
    """The hooks of every run, in their order; processes other than the main one write nothing."""
    hooks: list[HookBase] = [
        IterationTimer(),
        PeriodicCheckpoint(options.checkpoint_period),
        PeriodicEvaluation(options.eval_period),
    ]
    if options.best_metric:
        hooks.append(BestCheckpoint(options.best_metric, options.best_mode))
    if comm.is_main_process():
        hooks += [Writers(options.output_dir, options.log_period), Progress(options.log_period)]
    return hooks


class PeriodicCheckpoint(HookBase):
    """Saves ``model_<iteration>.pth`` every ``period`` iterations and ``model_final.pth`` after the last.

    A periodic checkpoint that cannot be written is reported and training goes on: stopping would lose more.
    At the end, where nothing else holds the result, it is an error.
    """

    def __init__(self, period: int) -> None:
        self.period = period

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        if done >= self.trainer.max_iter:
            self.trainer.save("model_final")
        elif done % self.period == 0:
            try:
                self.trainer.save(f"model_{self.trainer.iter:07d}")
            except CheckpointError as e:
                logger.error("%s\nTraining goes on.", e)


class PeriodicEvaluation(HookBase):
    """Evaluates every ``period`` iterations (0: never); the final evaluation is the trainer's own."""

    def __init__(self, period: int) -> None:
        self.period = period

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        if self.period and done % self.period == 0 and done < self.trainer.max_iter:
            self.trainer.test()


class BestCheckpoint(HookBase):
    """Saves ``model_best.pth`` when an evaluation improves ``metric``, and the value in ``model_best.json``.

    Args:
        metric: name in the flattened results, e.g. "bbox/AP50".
        mode: "max" or "min".
    """

    def __init__(self, metric: str, mode: str = "max") -> None:
        self.metric, self.better = metric, operator.gt if mode == "max" else operator.lt
        self.best: float | None = None
        self._seen: Mapping[str, Any] | None = None

    def before_train(self) -> None:
        self._record = Path(self.trainer.options.output_dir, "model_best.json")
        if self.trainer.start_iter and self._record.exists():
            record = json.loads(self._record.read_text())
            if record["metric"] == self.metric:
                self.best = record["value"]

    def after_step(self) -> None:
        self._check()

    def after_train(self) -> None:
        self._check()

    def _check(self) -> None:
        results = self.trainer.results
        if not results or results is self._seen:
            return
        self._seen = results
        if self.metric not in results:
            logger.error(
                "TEST.BEST_METRIC %r is not among the metrics: %s", self.metric, ", ".join(sorted(results))
            )
            return
        value = results[self.metric]
        if math.isfinite(value) and (self.best is None or self.better(value, self.best)):
            self.best = value
            try:
                self.trainer.save_best(self.metric, value)
            except (CheckpointError, WriteError) as e:
                logger.error("%s", e)


class Writers(HookBase):
    """Writes metrics.json and TensorBoard events every ``period`` iterations and at the end.

    A resumed run first drops the rows that iterations after its checkpoint have left in metrics.json.
    """

    def __init__(self, output_dir: str, period: int) -> None:
        self.output_dir, self.period = output_dir, period
        self._writers: list[EventWriter] = []

    def before_train(self) -> None:
        path = Path(self.output_dir, "metrics.json")
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            rows = [row for row in path.read_text().splitlines() if _iteration(row) < self.trainer.start_iter]
            write_text(path, "".join(f"{row}\n" for row in rows))
        self._writers = [JSONWriter(str(path)), TensorboardXWriter(self.output_dir)]

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        if done % self.period == 0 or done >= self.trainer.max_iter:
            self._write()

    def after_train(self) -> None:
        self._write()
        for writer in self._writers:
            writer.close()

    def _write(self) -> None:
        for writer in self._writers:
            try:
                writer.write()
            except OSError as e:  # a full disk must not cost the training
                logger.error("Cannot write metrics to %s: %s. Training goes on.", self.output_dir, e.strerror)


def _iteration(row: str) -> float:
    try:
        return float(json.loads(row)["iteration"])
    except (ValueError, KeyError):  # the last row of a killed run may be cut
        return math.inf


class Progress(HookBase):
    """A progress bar with losses, learning rate and time left on a terminal; plain log lines elsewhere."""

    def __init__(self, period: int) -> None:
        self.period = period
        self._bar: tqdm | None = None

    def before_train(self) -> None:
        self._first = self.trainer.progress(self.trainer.start_iter)
        if sys.stderr.isatty():
            loggers = [logging.getLogger(name) for name in ("detectron2", "fvcore", "clipdense")]
            self._redirect = logging_redirect_tqdm(loggers)
            self._redirect.__enter__()
            # progress, not iterations: a run under a wall-clock cap does not know how many it will do
            self._bar = tqdm(
                total=1.0, initial=self._first, bar_format="{l_bar}{bar}| {elapsed}<{remaining}{postfix}"
            )

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        if self._bar is not None:
            self._bar.set_postfix_str(self._line(), refresh=False)
            self._bar.update(self.trainer.progress(done) - self._bar.n)
        elif done % self.period == 0 or done >= self.trainer.max_iter:
            logger.info("%s", self._line())

    def after_train(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._redirect.__exit__(None, None, None)

    def _line(self) -> str:
        storage: EventStorage = self.trainer.storage
        latest = storage.latest_with_smoothing_hint()
        parts = [f"iter {self.trainer.iter + 1}/{self.trainer.options.max_iter}"]
        if self._bar is None:
            parts.append(f"eta {self._eta()}")
            losses = [name for name in latest if "loss" in name and name != "total_loss"]
        else:
            losses = []
        parts += [f"{name} {latest[name][0]:.4g}" for name in ("total_loss", *losses) if name in latest]
        parts += [f"{name} {latest[name][0]:.3g}" for name in ("lr", "time", "data_time") if name in latest]
        if torch.cuda.is_available():
            parts.append(f"max_mem {torch.cuda.max_memory_allocated() / 2**20:.0f}M")
        return "  ".join(parts)

    def _eta(self) -> datetime.timedelta:
        now = self.trainer.progress(self.trainer.iter + 1)
        share, seconds = now - self._first, self.trainer.elapsed - self.trainer.elapsed_before
        return datetime.timedelta(seconds=int(seconds * (1.0 - now) / share if share > 0 else 0))
