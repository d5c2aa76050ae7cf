"""The words of a user: classes, background, thresholds, and image examples in place of words."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clipdense.clip.vocabulary import Vocabulary
from clipdense.engine.options import ConfigError
from clipdense.inference import reject_pixels
from clipdense.open_vocabulary import ExampleEncoder, TextEmbeddings

__all__ = [
    "Example",
    "VocabularyLike",
    "append_background",
    "apply_thresholds",
    "class_thresholds",
    "embed_examples",
    "parse_example",
    "remove_background",
    "with_examples",
]

Box = tuple[float, float, float, float]
VocabularyLike = Vocabulary | str | Path | Sequence[str | Sequence[str]]


@dataclass(frozen=True)
class Example:
    """An object in a picture that stands for a class.

    Attributes:
        name: the class; a new one, or one of the vocabulary.
        image: file of the picture.
        box: x0, y0, x1, y1 in pixels of the upright picture; None for the whole picture.
    """

    name: str
    image: Path
    box: Box | None = None


def parse_example(text: str) -> Example:
    """Read an example, ``chair=photo.jpg:x0,y0,x1,y1``; without numbers, the whole picture is the example.

    Raises:
        ValueError: If there is no name, or the box is not four numbers with x0 < x1 and y0 < y1.
    """
    name, equal, rest = text.partition("=")
    if not equal or not name.strip() or not rest:
        raise ValueError(
            f"example {text!r}: expected NAME=IMAGE:x0,y0,x1,y1, such as chair=photo.jpg:10,20,90,80"
        )
    image, colon, numbers = rest.rpartition(":")
    if not colon or (not numbers.replace(",", "").replace(".", "").replace(" ", "").isdigit()):
        return Example(name.strip(), Path(rest).expanduser())
    try:
        x0, y0, x1, y1 = (float(number) for number in numbers.split(","))
    except ValueError:
        raise ValueError(f"example {text!r}: a box is four numbers x0,y0,x1,y1, not {numbers!r}") from None
    if not (x0 < x1 and y0 < y1):
        raise ValueError(f"example {text!r}: a box needs x0 < x1 and y0 < y1")
    return Example(name.strip(), Path(image).expanduser(), (x0, y0, x1, y1))


def class_thresholds(
    names: Sequence[str], threshold: float | None, entries: Mapping[str, float] | Iterable[str] = ()
) -> Tensor | None:
    """Return one threshold for each class (K,), 0..1; None if there are none.

    Args:
        names: K class names.
        threshold: of all classes; None is 0.
        entries: thresholds of single classes, by name or as ``NAME=0.3``.

    Raises:
        ValueError: If a name is not a class (the message has near matches), or a value is not in 0..1.
    """
    if not isinstance(entries, Mapping):
        entries = dict(_entry(text) for text in entries)
    if threshold is None and not entries:
        return None
    values = torch.full((len(names),), threshold or 0.0)
    for name, value in entries.items():
        values[Vocabulary.from_names(names, separator=None).index(name)] = value
    if wrong := [v for v in [*entries.values(), threshold or 0.0] if not 0 <= v <= 1]:
        raise ValueError(f"a threshold must be in 0..1, not {wrong[0]}")
    return values


def _entry(text: str) -> tuple[str, float]:
    name, _, number = text.rpartition("=")
    try:
        return name.strip(), float(number)
    except ValueError:
        raise ValueError(f"threshold {text!r}: expected NAME=SCORE, such as cat=0.3") from None


def apply_thresholds(output: Mapping[str, Any], thresholds: Tensor) -> dict[str, Any]:
    """Remove what scores less than the threshold of its class.

    Instances are removed. Pixels whose best class scores less get no class: ``sem_seg`` is 0 for all
    classes, and ``sem_seg_labels`` -1, if the output has the scores too. Segments of a panoptic map have no
    scores and stay.

    Args:
        output: output of a model for one image. It is not changed.
        thresholds: (K,), in the unit of the model's scores.
    """
    output = dict(output)
    if "instances" in output:
        found = output["instances"]
        output["instances"] = found[found.scores >= thresholds.to(found.scores)[found.pred_classes]]
    if "sem_seg" in output:
        scores = output["sem_seg"]
        best, labels = scores.max(0)
        labels = reject_pixels(labels, best, thresholds.to(best), -1)
        if "sem_seg_labels" in output:
            output["sem_seg_labels"] = output["sem_seg_labels"].masked_fill(labels < 0, -1)
        output["sem_seg"] = scores * (labels >= 0)
    return output


def with_examples(vocabulary: Vocabulary | None, examples: Sequence[Example]) -> Vocabulary:
    """Return the vocabulary with a class for each example that names none of its classes."""
    new = [e.name for e in examples if vocabulary is None or e.name not in vocabulary]
    if vocabulary is not None and not new:
        return vocabulary
    further = Vocabulary.from_names(list(dict.fromkeys(new)), separator=None)
    return further if vocabulary is None else append_background(vocabulary, further, thing=True)


def embed_examples(
    model: Any, vocabulary: Vocabulary, samples: Sequence[tuple[Example, Mapping[str, Any]]], weight: float
) -> TextEmbeddings:
    """Embed a vocabulary some of whose classes are shown in pictures.

    Args:
        model: an `ExampleEncoder`.
        vocabulary: all classes, background included.
        samples: each example, and its picture as the model's input.
        weight: see `ExampleEncoder.encode_examples`.

    Raises:
        ConfigError: If the model is not an `ExampleEncoder`.
        ValueError: If a box is outside of its picture, or the weight is not in 0..1.
    """
    if not isinstance(model, ExampleEncoder):
        raise ConfigError(
            f"{type(model).__name__} classifies by words only; image examples need a ZeroShotSegmentor (a "
            "CLIP "
            "without a config)"
        )
    if not 0 <= weight <= 1:
        raise ValueError(f"the weight of examples must be in 0..1, not {weight}")
    regions = [(vocabulary.index(e.name), *model.embed_region(sample, e.box)) for e, sample in samples]
    return model.encode_examples(vocabulary, regions, weight)


def remove_background(output: Mapping[str, Any], num_classes: int) -> dict[str, Any]:
    """Remove the classes after the first ``num_classes`` from an output.

    Args:
        output: output of a model for one image, with background classes last. It is not changed.
        num_classes: number of classes to keep.

    Returns:
        The output without background classes: ``sem_seg`` is 0 where one had the highest score,
        ``sem_seg_labels`` -1, the segment id 0; their instances and segments are gone.
    """
    output = dict(output)
    if "instances" in output:
        output["instances"] = output["instances"][output["instances"].pred_classes < num_classes]
    if "sem_seg" in output:
        scores = output["sem_seg"]
        output["sem_seg"] = scores[:num_classes] * (scores.argmax(dim=0) < num_classes)
    if "sem_seg_labels" in output:
        labels = output["sem_seg_labels"]
        output["sem_seg_labels"] = labels.where(labels < num_classes, -1)
    if "panoptic_seg" in output:
        ids, segments = output["panoptic_seg"]
        kept = [segment for segment in segments if segment["category_id"] < num_classes]
        known = torch.isin(ids, ids.new_tensor([segment["id"] for segment in kept]))
        output["panoptic_seg"] = ids * known, kept
    return output


def append_background(
    vocabulary: Vocabulary, background: VocabularyLike, *, thing: bool = False
) -> Vocabulary:
    """Append classes to a vocabulary, as stuff or, if ``thing``, as things."""
    further = Vocabulary.parse(background)
    base = vocabulary.base
    flags = vocabulary.thing or (True,) * len(vocabulary)
    rest = (False,) * len(further)
    return Vocabulary(
        vocabulary.synonyms + further.synonyms, base and base + rest, flags + (thing,) * len(rest)
    )
