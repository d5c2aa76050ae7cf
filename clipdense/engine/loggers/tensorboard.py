"""TensorBoard event files in the output folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from PIL import Image

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
        """Write the file as an image summary. `SummaryWriter.add_image` would encode its pixels anew."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        with Image.open(path) as image:
            width, height = image.size
        content = Summary.Image(
            height=height, width=width, colorspace=3, encoded_image_string=path.read_bytes()
        )
        summary = Summary(value=[Summary.Value(tag=name, image=content)])
        self._writer._get_file_writer().add_summary(summary, iteration)

    def close(self) -> None:
        """Close the file."""
        self._writer.close()
