"""Functions for one line: `segment`, `detect`, `panoptic`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from clipdense.run.prediction import Prediction
from clipdense.run.predictor import Predictor
from clipdense.run.sources import Source
from clipdense.run.words import VocabularyLike
from clipdense.run.zero_shot import NANO, default_background, zero_shot_config

__all__ = ["build_predictor", "detect", "panoptic", "segment"]

Predictions = Prediction | list[Prediction] | Iterator[Prediction]


def segment(image: Source, words: VocabularyLike | None = None, **options: Any) -> Predictions:
    """Label each pixel with one of some words.

    Without ``config``, a CLIP segments without any training (`ZeroShotSegmentor`).

    Args:
        image: file, array, PIL image, tensor, list, folder, glob or video, see `Predictor.predict`.
        words: classes, such as "cat|kitten, red car", see `Vocabulary.parse`; None: those of the ``config``.
        options: ``kind``, ``batch_size`` and ``tile`` of `Predictor.predict`; ``threshold``; and the
            arguments of `build_predictor`: ``config``, ``weights``, ``model``, ``pretrained``, ``method``,
            ``background``, ``device``.

    Returns:
        A `Prediction`, a list of them, or an iterator over those of a video.
    """
    return _run("semantic", image, words, options)


def detect(image: Source, words: VocabularyLike | None = None, **options: Any) -> Predictions:
    """Find the objects of some words; arguments and return value as of `segment`.

    Without ``config``, objects are the connected areas of the segmentation: two that touch are one.
    """
    return _run("instances", image, words, options)


def panoptic(image: Source, words: VocabularyLike | None = None, **options: Any) -> Predictions:
    """Segment objects and ground together; arguments and return value as of `segment`.

    Without ``config``, objects are the connected areas of the segmentation: two that touch are one.
    """
    return _run("panoptic", image, words, options)


def build_predictor(
    words: VocabularyLike | None = None,
    *,
    config: str | os.PathLike[str] = "",
    weights: str | os.PathLike[str] = "",
    model: str = NANO,
    pretrained: str = "",
    method: str = "",
    background: VocabularyLike | None = None,
    device: str = "",
    opts: tuple[Any, ...] = (),
    output: str | None = None,
    has_examples: bool = False,
) -> Predictor:
    """Build the predictor of a command: of a config, or of a CLIP without training.

    Args:
        words: classes; None: those of the config.
        config: config file of a trained model, or the folder of its training.
        weights: its weights; default: those that the config or the folder names.
        model: without ``config``, the CLIP, see `load_clip`.
        pretrained: tag or weight file of the CLIP, see `load_clip`.
        method: training-free method, ``MODEL.ZERO_SHOT.METHOD``.
        background: words for what is not wanted. None: without ``config``, words for the usual surroundings
            of things (`default_background`); "": none.
        device: "cpu", "cuda" ...; "": that of the config, or a GPU if there is one.
        opts: config overrides.
        output: see `Predictor`.
        has_examples: whether the caller sets classes by image examples afterwards.

    Raises:
        ValueError: If there are neither words nor a config.
    """
    none = isinstance(background, str) and not background.strip()
    chosen: dict[str, Any] = {"vocabulary": words, "background": None if none else background}
    chosen |= {"device": device or None, "output": output}
    if config:
        if os.path.isdir(config):
            return Predictor.from_pretrained(config, opts=opts, **chosen)
        return Predictor(config, weights or None, opts, **chosen)
    if words is None and not has_examples:
        raise ValueError('no words: name what to look for, such as "cat, red car"')
    cfg = zero_shot_config(model, pretrained, method, device, opts)
    if background is None and words is not None:
        chosen["background"] = default_background(model, words)
    if words is None:
        chosen["vocabulary"] = "thing"  # replaced by the examples
    return Predictor(cfg, **chosen)


@lru_cache(maxsize=2)
def _cached_predictor(has_words: bool, **arguments: Any) -> Predictor:
    """Return the predictor of these arguments, one for calls with words and one for calls without."""
    return build_predictor(None, has_examples=True, **arguments)


def _run(kind: str, image: Source, words: VocabularyLike | None, options: dict[str, Any]) -> Predictions:
    """Predict with a predictor that is kept for the next call with the same model."""
    prediction = {key: options.pop(key) for key in ("batch_size", "tile") if key in options}
    kind = options.pop("kind", kind)
    threshold, background = options.pop("threshold", None), options.pop("background", None)
    if words is None and not options.get("config"):
        raise ValueError('no words: name what to look for, such as "cat, red car"')
    predictor = _cached_predictor(words is not None, **options)
    if words is not None:
        if background is None and not options.get("config"):
            background = default_background(options.get("model", NANO), words)
        none = isinstance(background, str) and not background.strip()
        predictor.set_vocabulary(words, None if none else background)
    predictor.set_thresholds(threshold)
    return predictor.predict(image, kind=kind, **prediction)
