"""One run of ``clipdense segment``, ``detect`` or ``panoptic``: from its options to its exit status."""

from __future__ import annotations

import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from clipdense.engine.options import ConfigError
from clipdense.run.api import build_predictor
from clipdense.run.inputs import find_inputs
from clipdense.run.outputs import OutputFolder
from clipdense.run.predicting import PredictionSettings, predict_inputs
from clipdense.run.predictor import Predictor
from clipdense.run.zero_shot import NANO, default_background

__all__ = ["FileJob", "run_job"]

_DETECTION_THRESHOLD = 0.5


@dataclass(frozen=True)
class FileJob:
    """Options of a command; its help describes them.

    Attributes:
        kind: "semantic", "instances" or "panoptic".
        images: see `find_inputs`.
        words: classes; None: those of ``config``.
        background: see `build_predictor`.
        examples: see `Predictor.set_vocabulary`.
        example_weight: see `Predictor.set_vocabulary`.
        threshold: see `Predictor.set_thresholds`.
        class_thresholds: see `Predictor.set_thresholds`.
        model: see `build_predictor`.
        pretrained: see `build_predictor`.
        method: see `build_predictor`.
        config: see `build_predictor`.
        weights: see `build_predictor`.
        overrides: ``KEY=VALUE`` with values in YAML.
        device: see `build_predictor`.
        output: folder of the results.
        formats: see `clipdense.run.outputs.FORMATS`.
        recursive: see `find_inputs`.
        allow_urls: see `find_inputs`.
        tile: see `PredictionSettings`.
        batch_size: see `PredictionSettings`.
        max_frames: see `PredictionSettings`.
    """

    kind: str
    images: list[str]
    words: str | None = None
    background: str | None = None
    examples: tuple[str, ...] = ()
    example_weight: float = 1.0
    threshold: float | None = None
    class_thresholds: tuple[str, ...] = ()
    model: str = NANO
    pretrained: str = ""
    method: str = ""
    config: str = ""
    weights: str = ""
    overrides: tuple[str, ...] = ()
    device: str = ""
    output: Path = Path("output/predictions")
    formats: tuple[str, ...] = ("pictures", "coco")
    recursive: bool = True
    allow_urls: bool = False
    tile: int = 0
    batch_size: int = 1
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
        predictor = _predictor(job)
        outputs = OutputFolder(job.output, predictor.metadata, job.formats, inputs=inputs.images)
        settings = PredictionSettings(job.kind, job.batch_size, job.tile, max_frames=job.max_frames)
        return predict_inputs(predictor, inputs, outputs, settings)


def _predictor(job: FileJob) -> Predictor:
    """Build the predictor, with its words, examples and thresholds."""
    lazy = job.config.endswith(".py")
    opts = job.overrides if lazy else tuple(word for text in job.overrides for word in _override(text))
    predictor = build_predictor(
        job.words,
        config=job.config,
        weights=job.weights,
        model=job.model,
        pretrained=job.pretrained,
        method=job.method,
        background=job.background,
        device=job.device,
        opts=opts,
        output=job.kind,
        has_examples=bool(job.examples),
    )
    if job.examples:
        background = job.background
        if background is None and not job.config:
            background = default_background(job.model, job.words)
        predictor.set_vocabulary(
            job.words, background or None, examples=job.examples, example_weight=job.example_weight
        )
    threshold = job.threshold
    if threshold is None and job.config and job.kind == "instances":
        threshold = _DETECTION_THRESHOLD
    predictor.set_thresholds(threshold, job.class_thresholds)
    return predictor


def _override(text: str) -> tuple[str, Any]:
    key, equal, value = text.partition("=")
    if not equal:
        raise ConfigError(f"--set takes KEY=VALUE, not {text!r}")
    return key, yaml.safe_load(value)
