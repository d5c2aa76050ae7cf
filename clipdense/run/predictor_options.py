"""Options that all predicting commands share: model, words, thresholds and batches."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from clipdense.data.image import MAX_PIXELS
from clipdense.engine.options import ConfigError
from clipdense.engine.parts import file_digest
from clipdense.engine.run_config import run_config
from clipdense.run.api import build_predictor
from clipdense.run.keys import config_value
from clipdense.run.predictor import Predictor
from clipdense.run.pretrained import folder_files
from clipdense.run.setup import load_config
from clipdense.run.words import parse_example
from clipdense.run.zero_shot import NANO, default_background, zero_shot_config

__all__ = ["PredictorOptions"]

_DETECTION_THRESHOLD = 0.5


@dataclass(frozen=True, kw_only=True)
class PredictorOptions:
    """Options of the predictor of a command; its help describes them.

    Attributes:
        kind: "semantic", "instances" or "panoptic"; "": the first that the model has.
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
        tile: side of tiles in pixels for larger images; 0: no tiles.
        batch_size: images in a batch.
    """

    kind: str = ""
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
    tile: int = 0
    batch_size: int = 1

    def build(self, device: str = "") -> Predictor:
        """Build the predictor, with its words, examples and thresholds.

        Args:
            device: instead of the option.

        Raises:
            ConfigError: If the config is wrong, or does not fit the words.
            ValueError: If words, examples or thresholds are wrong.
        """
        predictor = build_predictor(
            self.words,
            config=self.config,
            weights=self.weights,
            model=self.model,
            pretrained=self.pretrained,
            method=self.method,
            background=self.background,
            device=device or self.device,
            opts=self._opts,
            output=self.kind or None,
            has_examples=bool(self.examples),
        )
        if self.examples:
            background = self.background
            if background is None and not self.config:
                background = default_background(self.model, self.words)
            predictor.set_vocabulary(
                self.words, background or None, examples=self.examples, example_weight=self.example_weight
            )
        threshold = self.threshold
        if threshold is None and self.config and self.kind == "instances":
            threshold = _DETECTION_THRESHOLD
        predictor.set_thresholds(threshold, self.class_thresholds)
        return predictor

    def load_config(self) -> Any:
        """Load the config without the model.

        Raises:
            ConfigError: If it is wrong.
            FileNotFoundError: If a file is missing.
            ValueError: If there are neither words nor a config.
        """
        if self.config:
            path = Path(self.config)
            if path.is_dir():
                return load_config(folder_files(path)[0], self._opts)
            return load_config(self.config, self._opts)
        if self.words is None and not self.examples:
            raise ValueError('no words: name what to look for, such as "cat, red car"')
        return zero_shot_config(self.model, self.pretrained, self.method, self.device, self._opts)

    def settings(self, cfg: Any) -> dict[str, Any]:
        """Return what determines the predictions: the options, and hashes of the files that they name.

        Args:
            cfg: from `load_config`.
        """
        options = {f.name: getattr(self, f.name) for f in fields(PredictorOptions) if f.name != "device"}
        digests = {path: file_digest(path) for path in self._files(cfg)}
        return options | {"content of files": {path: digest for path, digest in digests.items() if digest}}

    def max_pixels(self, cfg: Any) -> int:
        """Return the largest image that is read, in pixels."""
        return int(config_value(cfg, "INPUT.MAX_PIXELS") or MAX_PIXELS)

    @property
    def _opts(self) -> tuple[Any, ...]:
        if self.config.endswith(".py"):
            return self.overrides
        return tuple(word for text in self.overrides for word in _override(text))

    def _files(self, cfg: Any) -> Iterator[str]:
        """Yield the names that may be files whose content matters."""
        yield from (self.config, self.weights or run_config(cfg).weights or "", self.model, self.pretrained)
        if os.path.isdir(self.config):
            yield from folder_files(Path(self.config))
        yield from (self.words or "", self.background or "")
        yield from (str(parse_example(example).image) for example in self.examples)


def _override(text: str) -> tuple[str, Any]:
    key, equal, value = text.partition("=")
    if not equal:
        raise ConfigError(f"--set takes KEY=VALUE, not {text!r}")
    return key, yaml.safe_load(value)
