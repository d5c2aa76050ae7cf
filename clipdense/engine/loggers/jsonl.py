"""JSON lines in ``metrics.json``, one object a row, as Detectron2 writes them; NaN becomes null."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from clipdense.engine.loggers.base import RunInfo, RunLogger
from clipdense.files import json_text

__all__ = ["JSONLinesLogger"]


class JSONLinesLogger(RunLogger):
    """Appends rows ``{"iteration": ..., "total_loss": ..., ...}`` to ``metrics.json``.

    Pictures are files in the same folder already.

    Args:
        run: its folder holds the file.
    """

    def __init__(self, run: RunInfo) -> None:
        self._file = (run.folder / "metrics.json").open("a", encoding="utf-8")

    def write(self, scalars: Mapping[str, float], iteration: int) -> None:
        """Append a row."""
        self._file.write(json_text(dict(sorted({**scalars, "iteration": iteration}.items()))) + "\n")
        self._file.flush()

    def picture(self, name: str, path: Path, iteration: int) -> None:
        """Do nothing: the picture is in the folder."""

    def close(self) -> None:
        """Close the file."""
        self._file.close()
