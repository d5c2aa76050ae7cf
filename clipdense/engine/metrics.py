"""Metrics of a run in checkpoints and metrics.json, so that a resumed run continues them exactly."""

import json
import math
from collections.abc import Mapping
from pathlib import Path

from clipdense.files import write_text

from detectron2.utils.events import EventStorage

__all__ = ["current_scalars", "drop_rows_from", "has_row", "recent_history", "restore_metrics"]

# Number of values of which Detectron2's writers take the median.
_SMOOTHING_WINDOW = 20

History = Mapping[str, list[tuple[float, float]]]
Scalars = dict[str, tuple[float, int, bool]]


def recent_history(storage: EventStorage) -> dict[str, list[tuple[float, float]]]:
    """Return the last values of each smoothed scalar with their iterations, for the metric writers."""
    smoothed = [name for name, smooth in storage.smoothing_hints().items() if smooth]
    return {name: storage.history(name).values()[-_SMOOTHING_WINDOW:] for name in smoothed}


def current_scalars(storage: EventStorage, iteration: int) -> Scalars:
    """Return the scalars of an iteration: name -> (value, iteration, whether it is smoothed)."""
    hints = storage.smoothing_hints()
    return {
        name: (value, at, hints[name]) for name, (value, at) in storage.latest().items() if at == iteration
    }


def restore_metrics(storage: EventStorage, history: History, scalars: Scalars) -> None:
    """Fill the storage of a resumed run.

    Args:
        storage: storage at the first iteration of the resumed run.
        history: result of `recent_history` in the earlier run.
        scalars: result of `current_scalars` in the earlier run if they have not been written to metrics.json;
            they become the current ones. Otherwise empty.
    """
    start = storage.iter
    for name, values in history.items():
        for value, iteration in values:
            if name not in scalars or iteration < start - 1:
                storage.histories()[name].update(value, iteration)
    for name, (value, iteration, smooth) in scalars.items():
        storage.iter = iteration
        storage.put_scalar(name, value, smoothing_hint=smooth)
    storage.iter = start


def drop_rows_from(path: Path, start_iter: int) -> None:
    """Remove the rows of metrics.json that a resumed run will write again.

    Args:
        path: the file, with one JSON object per line.
        start_iter: iteration at which training resumes.
    """
    if path.exists():
        rows = [row for row in _rows(path) if _iteration(row) < start_iter]
        write_text(path, "".join(f"{row}\n" for row in rows))


def has_row(path: Path, iteration: int) -> bool:
    """Return whether metrics.json has a row for an iteration."""
    return path.exists() and any(_iteration(row) == iteration for row in _rows(path))


def _rows(path: Path) -> list[str]:
    # a file that was damaged is repaired row by row: what cannot be read is dropped
    return path.read_text(errors="replace").splitlines()


def _iteration(row: str) -> float:
    try:
        return float(json.loads(row)["iteration"])
    except (
        ValueError,
        KeyError,
        TypeError,
        RecursionError,
    ):  # the last row of a killed run may be incomplete
        return math.inf
