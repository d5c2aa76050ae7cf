"""One run of ``clipdense segment``, ``detect`` or ``panoptic``: from its options to its exit status."""

from __future__ import annotations

import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path

from clipdense.run.inputs import find_inputs
from clipdense.run.outputs import OutputFolder
from clipdense.run.predicting import PredictionSettings, predict_inputs
from clipdense.run.predictor_options import PredictorOptions

__all__ = ["FileJob", "run_job"]


@dataclass(frozen=True, kw_only=True)
class FileJob(PredictorOptions):
    """Options of a command; its help describes them.

    Attributes:
        images: see `find_inputs`.
        output: folder of the results.
        formats: see `clipdense.run.outputs.FORMATS`.
        recursive: see `find_inputs`.
        allow_urls: see `find_inputs`.
        max_frames: see `PredictionSettings`.
    """

    images: list[str]
    output: Path = Path("output/predictions")
    formats: tuple[str, ...] = ("pictures", "coco")
    recursive: bool = True
    allow_urls: bool = False
    max_frames: int = 0


def run_job(job: FileJob) -> int:
    """Run a command.

    Returns:
        The exit status: 1 if an input failed, else 0.

    Raises:
        FileNotFoundError: If no input is an image.
        ValueError: If words, examples, thresholds or formats are wrong.
        ConfigError: If the config is wrong, or does not fit the words.
    """
    # detectron2 0.6 on current torch versions
    warnings.filterwarnings("ignore", "TypedStorage is deprecated|torch.meshgrid", UserWarning)
    with tempfile.TemporaryDirectory(prefix="clipdense-") as downloads:
        inputs = find_inputs(
            job.images, recursive=job.recursive, allow_urls=job.allow_urls, downloads=downloads
        )
        if not inputs:
            reasons = "; ".join(
                why if name in why else f"{name}: {why}" for name, why in inputs.failed.items()
            )
            raise FileNotFoundError(f"no images: {reasons}")
        predictor = job.build()
        outputs = OutputFolder(job.output, predictor.metadata, job.formats, inputs=inputs.images)
        settings = PredictionSettings(job.kind, job.batch_size, job.tile, max_frames=job.max_frames)
        return predict_inputs(predictor, inputs, outputs, settings)
