"""TensorBoard event files in the output folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from clipdense.data.image import read_image
from clipdense.engine.loggers.base import RunInfo, RunLogger

__all__ = ["TensorBoardLogger"]


class TensorBoardLogger(RunLogger):
    """Writes ``events.out.tfevents.*``.

    Args:
        run: its folder holds the files.
    """

    def __init__(self, run: RunInfo) -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow to import

        self._writer = SummaryWriter(str(run.folder))

    def write(self, scalars: Mapping[str, float], iteration: int) -> None:
        """Write each scalar."""
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, iteration)

    def picture(self, name: str, path: Path, iteration: int) -> None:
        """Write the picture as an image summary."""
        self._writer.add_image(name, read_image(path), iteration, dataformats="HWC")

    def close(self) -> None:
        """Close the file."""
        self._writer.close()
