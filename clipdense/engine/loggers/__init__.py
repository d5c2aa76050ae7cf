"""Loggers of a training run: each file adapts one service, and `RunLoggers` writes to all of them.

A logger gets the settings of the run, then rows of scalars with rising iterations, then the pictures of the
predictions.
"""

from clipdense.engine.loggers.base import RunInfo, RunLogger
from clipdense.engine.loggers.jsonl import JSONLinesLogger
from clipdense.engine.loggers.tensorboard import TensorBoardLogger
from clipdense.engine.loggers.trackio import TrackioLogger
from clipdense.engine.loggers.wandb import WandbLogger
from clipdense.engine.loggers.writer import RunLoggers

__all__ = ["LOGGERS", "JSONLinesLogger", "RunInfo", "RunLogger", "RunLoggers"]

LOGGERS: dict[str, type[RunLogger]] = {
    "tensorboard": TensorBoardLogger,
    "trackio": TrackioLogger,
    "wandb": WandbLogger,
}
"""Names for ``SOLVER.LOGGERS``; metrics.json is always written, as resuming reads it."""
