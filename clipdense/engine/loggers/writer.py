"""One writer for all loggers of a run."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from clipdense.engine.loggers.base import RunInfo, RunLogger

from detectron2.utils.events import EventWriter, get_event_storage

__all__ = ["RunLoggers"]

logger = logging.getLogger(__name__)

_WINDOW = 20
"""Number of values of which smoothed scalars are the median, as in Detectron2."""

_PICTURES = ("predictions_*.png", "scores_*.png")


class RunLoggers(EventWriter):
    """Writes scalars and pictures of a run to all of its loggers.

    A full disk or a service that fails does not stop the training.

    The loggers are built at the first write, so that a resumed run can correct metrics.json first (see
    `clipdense.engine.metrics.drop_rows_from`).

    Args:
        run: the run.
        kinds: classes of the loggers.

    Raises:
        ConfigError: If the package of a logger is not installed.
    """

    def __init__(self, run: RunInfo, kinds: Sequence[type[RunLogger]]) -> None:
        for kind in kinds:
            kind.require()
        self._run, self._kinds = run, list(kinds)
        self._loggers: list[RunLogger] | None = None
        self._last = -1

    def write(self) -> None:
        """Write the latest scalars, in rows of one iteration each."""
        rows: dict[int, dict[str, float]] = {}
        for name, (value, iteration) in get_event_storage().latest_with_smoothing_hint(_WINDOW).items():
            if iteration > self._last:
                rows.setdefault(iteration, {})[name] = value
        for iteration in sorted(rows):
            self._each(lambda each, i=iteration: each.write(rows[i], i))  # type: ignore[misc]
        self._last = max([self._last, *rows])

    def write_pictures(self, iteration: int) -> None:
        """Write the pictures of predictions that lie in the output folder."""
        for path in sorted(p for pattern in _PICTURES for p in self._run.folder.glob(pattern)):
            self._each(lambda each, p=path: each.picture(p.stem, p, iteration))  # type: ignore[misc]

    def close(self) -> None:
        """Close the loggers, which writes what they have buffered."""
        if self._loggers is not None:
            self._each(lambda each: each.close())

    def _each(self, action: Callable[[RunLogger], object]) -> None:
        """Call a function on every logger; log an error instead of raising it."""
        if self._loggers is None:
            self._run.folder.mkdir(parents=True, exist_ok=True)
            self._loggers = []
            for kind in self._kinds:
                self._attempt(kind, lambda k=kind: self._add(k))  # type: ignore[misc]
        for each in self._loggers:
            self._attempt(type(each), lambda e=each: action(e))  # type: ignore[misc]

    def _add(self, kind: type[RunLogger]) -> None:
        assert self._loggers is not None
        self._loggers.append(kind(self._run))

    def _attempt(self, kind: type[RunLogger], action: Callable[[], object]) -> None:
        try:
            action()
        except OSError as e:
            logger.error("cannot write metrics to %s: %s. Training continues.", self._run.folder, e.strerror)
        except Exception as e:  # services raise errors of their own
            logger.error("%s: %s. Training continues.", kind.__name__, e)
