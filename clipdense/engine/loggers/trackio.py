"""Trackio: a local database, in the folder of ``TRACKIO_DIR``, that ``trackio show`` opens as a page."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from clipdense.engine.loggers.base import RunInfo, RunLogger

__all__ = ["TrackioLogger"]

_RENAMED = {"time": "iteration_time"}
"""Names that Trackio keeps for itself."""


class TrackioLogger(RunLogger):
    """Writes to a run of Trackio, which a resumed training continues.

    Args:
        run: names the run.
    """

    package = "trackio"

    def __init__(self, run: RunInfo) -> None:
        import trackio

        self._trackio = trackio
        self._run = trackio.init(
            project=run.project,
            name=f"{run.name}-{run.identity()}",
            config=run.settings(),
            resume="allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def write(self, scalars: Mapping[str, float], iteration: int) -> None:
        """Write the finite scalars at the step of the iteration."""
        named = {_RENAMED.get(name, name): value for name, value in scalars.items()}
        finite = {name: value for name, value in named.items() if math.isfinite(value)}
        self._run.log(finite, step=iteration)

    def picture(self, name: str, path: Path, iteration: int) -> None:
        """Write the picture at the step of the iteration."""
        self._run.log({name: self._trackio.Image(str(path), caption=path.name)}, step=iteration)

    def close(self) -> None:
        """End the run."""
        self._run.finish()
