"""Hooks of every run: checkpoints, evaluation, early stopping, loggers and progress.

`IterationTimer`, `EvalHook`, `BestCheckpointer` and `PeriodicWriter` are Detectron2's. The subclasses below
add what exact resuming and full disks need.
"""

import datetime
import json
import logging
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from clipdense.checkpoint import CheckpointError
from clipdense.engine.loggers import LOGGERS, JSONLinesLogger, RunInfo, RunLoggers
from clipdense.engine.options import TrainerOptions
from clipdense.engine.training_state import save_best
from clipdense.engine.validation_loss import ValidationLoss
from clipdense.files import WriteError

from detectron2.engine.hooks import BestCheckpointer, EvalHook, IterationTimer, PeriodicWriter
from detectron2.engine.train_loop import HookBase
from detectron2.utils import comm
from detectron2.utils.events import EventStorage

__all__ = [
    "BestCheckpoint",
    "EarlyStopping",
    "Evaluation",
    "MetricRows",
    "PeriodicCheckpoint",
    "Progress",
    "default_hooks",
    "repeat_after_step",
]

logger = logging.getLogger(__name__)


def default_hooks(trainer: Any) -> list[HookBase]:
    """Return the hooks of a `Trainer` in their order; only the main process writes files."""
    options = trainer.options
    hooks: list[HookBase] = [
        IterationTimer(),
        PeriodicCheckpoint(options.checkpoint_period),
        Evaluation(options.eval_period, trainer.test),
    ]
    if trainer.validation_batches is not None:
        hooks.append(ValidationLoss(options.loss_period, trainer.validation_batches))
    best = BestCheckpoint(trainer) if options.best_metric else None
    if best is not None:
        hooks.append(best)
    if options.early_stopping_patience:
        hooks.append(EarlyStopping(best, options.best_period, options.early_stopping_patience))
    if comm.is_main_process():
        run = RunInfo(Path(options.output_dir), options.logger_project)
        loggers = RunLoggers(run, [JSONLinesLogger, *(LOGGERS[name] for name in options.loggers)])
        hooks += [MetricRows(loggers, options), Progress(options.log_period)]
    return hooks


def repeat_after_step(trainer: Any) -> None:
    """Evaluate and log the last iteration of a resumed run, whose process was killed before that was done.

    The checkpoint is saved first of all. Therefore the hooks after `PeriodicCheckpoint` run again.

    Args:
        trainer: trainer at the first iteration after the checkpoint.
    """
    hooks = list(trainer._hooks)
    first = next(i for i, hook in enumerate(hooks) if isinstance(hook, PeriodicCheckpoint)) + 1
    trainer.iter = trainer.storage.iter = trainer.start_iter - 1
    for hook in hooks[first:]:
        hook.after_step()
    trainer.iter = trainer.storage.iter = trainer.start_iter


class PeriodicCheckpoint(HookBase):
    """Saves ``model_<iteration>.pth`` every ``period`` iterations and ``model_final.pth`` after the last.

    If a periodic checkpoint cannot be written, the error is logged and training continues. At the end it is
    raised, since no other file holds the result. Detectron2's hook cannot save the trainer's state, which all
    processes contribute to.
    """

    def __init__(self, period: int) -> None:
        self.period = period

    def after_step(self) -> None:
        """Save a checkpoint if one is due."""
        done = self.trainer.iter + 1
        if done >= self.trainer.max_iter:
            self.trainer.save("model_final")
        elif done % self.period == 0:
            try:
                self.trainer.save(f"model_{self.trainer.iter:07d}")
            except (CheckpointError, WriteError) as e:
                logger.error("%s\nTraining continues.", e)


class Evaluation(EvalHook):
    """Detectron2's evaluation hook; evaluates at the end only if training was not interrupted or failed."""

    def after_train(self) -> None:
        """Evaluate the trained model."""
        if self.trainer.finished:
            super().after_train()


class BestCheckpoint(BestCheckpointer):
    """Detectron2's best-checkpoint hook; a resumed run continues with the best value so far.

    It saves the evaluated weights as ``model_best.pth`` and the value in ``model_best.json``. The main
    process decides, and all processes take part, since each may hold a part of the weights.
    """

    def __init__(self, trainer: Any) -> None:
        options = trainer.options
        super().__init__(options.best_period, self, options.best_metric, options.best_mode)
        self.metric, self.record = options.best_metric, Path(options.output_dir, "model_best.json")
        self.best_period, self._name = options.best_period, ""

    def before_train(self) -> None:
        """Read the best value of the resumed run.

        Raises:
            CheckpointError: If the record cannot be read.
        """
        if not self.trainer.start_iter or not self.record.exists():
            return
        try:
            record = json.loads(self.record.read_text())
            metric, value, iteration = record["metric"], float(record["value"]), int(record["iteration"])
        except (ValueError, KeyError, TypeError) as e:
            raise CheckpointError(
                f"{self.record} is damaged ({e!r}). Delete it to start again with the best value so far."
            ) from e
        if metric == self.metric:
            self.best_metric, self.best_iter = value, iteration

    def after_step(self) -> None:
        """Save the weights if they have been evaluated and are the best."""
        if self.best_period > 0 and (self.trainer.iter + 1) % self.best_period == 0:
            self._check(super().after_step)

    def after_train(self) -> None:
        """Save the final weights if they are the best; nothing after an error or an interruption."""
        if self.trainer.finished:
            self._check(super().after_train)

    def save(self, name: str, **state: Any) -> None:
        """Note that the weights are the best; `BestCheckpointer` calls this method of its checkpointer."""
        self._name = name

    def _check(self, compare: Callable[[], None]) -> None:
        self._name = ""
        if comm.is_main_process():
            compare()
        name = comm.all_gather(self._name)[0]
        if not name:
            return
        with self.trainer.evaluated_weights():
            if comm.is_main_process():
                try:
                    save_best(self.trainer, name, self.metric)
                except (CheckpointError, WriteError) as e:
                    logger.error("%s\nTraining continues.", e)


class EarlyStopping(HookBase):
    """Ends the training if the best metric has not improved for ``patience`` evaluations.

    The best value and its iteration are those of `BestCheckpoint`, which a resumed run restores. So a run
    that is interrupted and resumed ends where it would have ended, and a run that has ended stays so unless
    its patience is raised.

    Args:
        best: hook whose state in the main process counts.
        period: iterations between two evaluations.
        patience: number of evaluations.
    """

    def __init__(self, best: BestCheckpoint | None, period: int, patience: int) -> None:
        self._best, self._period, self._patience = best, period, patience

    def before_train(self) -> None:
        """End a resumed run that has ended before."""
        if self.trainer.start_iter and self._is_due(self.trainer.start_iter):
            self.trainer.stop_early(self.trainer.start_iter)

    def after_step(self) -> None:
        """End the training if it is time."""
        done = self.trainer.iter + 1
        if done % self._period == 0 and done < self.trainer.max_iter and self._is_due(done):
            self.trainer.stop_early(done)

    def _is_due(self, done: int) -> bool:
        due = False
        if self._best is not None and comm.is_main_process():
            best = -1 if self._best.best_iter is None else self._best.best_iter
            due = done // self._period - (best + 1) // self._period >= self._patience
        return any(comm.all_gather(due))


class MetricRows(PeriodicWriter):
    """Detectron2's hook that writes metrics; writes them after every evaluation as well.

    A resumed run thus finds in metrics.json which evaluations are done.

    Args:
        loggers: where the metrics are written.
        options: with the periods of logging and of evaluations.
    """

    def __init__(self, loggers: RunLoggers, options: TrainerOptions) -> None:
        super().__init__([loggers], options.log_period)
        self._loggers, self._options = loggers, options

    def after_step(self) -> None:
        """Write the metrics if they are due."""
        done = self.trainer.iter + 1
        if self._options.row_is_due(done) and done % self._period and done < self.trainer.max_iter:
            self._loggers.write()
        super().after_step()

    def after_train(self) -> None:
        """Write the last metrics, unless the run stopped early: it will write them when it is resumed."""
        if self.trainer.finished:
            self._loggers.write()
            self._loggers.write_pictures(self.trainer.iter)
        self._loggers.close()


class Progress(HookBase):
    """Shows a progress bar on a terminal, and logs lines elsewhere.

    It estimates the time left from the trainer's progress instead of its iterations, which Detectron2's
    printer uses: a run with a wall-clock limit does not know its number of iterations.

    Args:
        period: iterations from one line to the next; slow ones get a line after 5 seconds.
    """

    _SECONDS = 5.0

    def __init__(self, period: int) -> None:
        self.period = period
        self._bar: tqdm | None = None

    def before_train(self) -> None:
        """Open the progress bar."""
        self._first = self.trainer.progress(self.trainer.start_iter)
        self._logged = time.perf_counter()
        if sys.stderr.isatty():
            loggers = [logging.getLogger(name) for name in ("detectron2", "fvcore", "clipdense")]
            self._redirect = logging_redirect_tqdm(loggers)
            self._redirect.__enter__()
            self._bar = tqdm(
                total=1.0, initial=self._first, bar_format="{l_bar}{bar}| {elapsed}<{remaining}{postfix}"
            )

    def after_step(self) -> None:
        """Update the bar, or log a line every ``period`` iterations."""
        done = self.trainer.iter + 1
        if self._bar is not None:
            self._bar.set_postfix_str(self._line(), refresh=False)
            self._bar.update(self.trainer.progress(done) - self._bar.n)
        elif done % self.period == 0 or done >= self.trainer.max_iter or self._is_late():
            self._logged = time.perf_counter()
            logger.info("%s", self._line())

    def _is_late(self) -> bool:
        return time.perf_counter() - self._logged >= self._SECONDS

    def after_train(self) -> None:
        """Close the bar."""
        if self._bar is not None:
            self._bar.close()
            self._redirect.__exit__(None, None, None)

    def _line(self) -> str:
        storage: EventStorage = self.trainer.storage
        latest = storage.latest_with_smoothing_hint()
        parts = [f"iter {self.trainer.iter + 1}/{self.trainer.options.max_iter}"]
        names = ["total_loss"]
        if self._bar is None:
            parts.append(f"eta {self._time_left()}")
            names += [n for n in latest if "loss" in n and n != "total_loss" and "validation/" not in n]
        parts += [f"{name} {latest[name][0]:.4g}" for name in names if name in latest]
        parts += [f"{name} {latest[name][0]:.3g}" for name in ("lr", "time", "data_time") if name in latest]
        if torch.cuda.is_available():
            parts.append(f"max_mem {torch.cuda.max_memory_allocated() / 2**20:.0f}M")
        return "  ".join(parts)

    def _time_left(self) -> datetime.timedelta:
        now = self.trainer.progress(self.trainer.iter + 1)
        share, seconds = now - self._first, self.trainer.elapsed - self.trainer.elapsed_before
        return datetime.timedelta(seconds=int(seconds * (1.0 - now) / share if share > 0 else 0))
