"""Weights & Biases. ``WANDB_MODE=offline`` writes below the output folder, for ``wandb sync`` later."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from clipdense.engine.loggers.base import RunInfo, RunLogger

__all__ = ["WandbLogger"]


class WandbLogger(RunLogger):
    """Writes to a run of Weights & Biases, which a resumed training continues.

    Args:
        run: names the run; its folder holds the local files in ``wandb``.
    """

    package = "wandb"

    def __init__(self, run: RunInfo) -> None:
        import wandb

        self._wandb = wandb
        self._run = wandb.init(
            project=run.project,
            name=run.name,
            id=run.identity(),
            dir=str(run.folder),
            config=run.settings(),
            resume="allow",
        )

    def write(self, scalars: Mapping[str, float], iteration: int) -> None:
        """Write the scalars at the step of the iteration."""
        self._run.log(dict(scalars), step=iteration)

    def picture(self, name: str, path: Path, iteration: int) -> None:
        """Write the picture at the step of the iteration."""
        self._run.log({name: self._wandb.Image(str(path))}, step=iteration)

    def close(self) -> None:
        """End the run."""
        self._run.finish()
