"""The range or the choices of the keys that list the user's data and that watch a training."""

from __future__ import annotations

from clipdense.data.datasets.own import FORMATS
from clipdense.engine.device import COMPILE_MODES, PRECISIONS
from clipdense.engine.loggers import LOGGERS
from clipdense.run.config_checks import Check, choice, items, text, whole

__all__ = ["RUN_CHECKS"]

_NAMES = items(text())

RUN_CHECKS: dict[str, Check] = {
    "DATASETS.TRAIN": _NAMES,
    "DATASETS.TEST": _NAMES,
    **{f"DATASETS.{key}": _NAMES for key in FORMATS},
    "DATALOADER.SHUFFLE_SHARDS": whole(1),
    "TEST.EVAL_PERIOD": whole(0),
    "TEST.BEST_METRIC": text(),
    "TEST.BEST_MODE": choice("max", "min"),
    "TEST.LOSS.PERIOD": whole(0),
    "TEST.LOSS.DATASETS": _NAMES,
    "TEST.LOSS.MAX_BATCHES": whole(0),
    "TEST.EARLY_STOPPING.PATIENCE": whole(0),
    "TEST.PRECISION": choice(*PRECISIONS),
    "MODEL.COMPILE.MODULES": _NAMES,
    "MODEL.COMPILE.MODE": choice(*COMPILE_MODES),
    "SOLVER.LOG_PERIOD": whole(1),
    "SOLVER.PARALLEL": choice("ddp", "fsdp"),
    "SOLVER.SHARD_PROCESSES": whole(0),
    "SOLVER.LOGGERS": items(choice(*LOGGERS)),
    "SOLVER.LOGGER_PROJECT": text(),
}
"""Key -> the check of its value."""
