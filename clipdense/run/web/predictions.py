"""Predictions of the web page: pictures, score maps, tables, and files to download."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from clipdense.clip.vocabulary import Vocabulary
from clipdense.data.image import BadImageError, header_size, read_image
from clipdense.evaluation.detections import encode_masks
from clipdense.files import json_text, write_text
from clipdense.run.web.limits import Limits, RequestError
from clipdense.run.web.models import ServedModel
from clipdense.run.words import remove_background
from clipdense.visualization.canvas import Picture
from clipdense.visualization.pictures import GAP, add_title, draw_output, overlay_heat, save_picture
from clipdense.visualization.segments import class_labels, output_kind, output_segments, to_array

__all__ = ["Prediction", "Upload", "parse_words", "predict", "read_uploads", "save_json", "save_png"]

logger = logging.getLogger(__name__)

MIN_SIDE, MAX_SIDE = 384, 1024
"""Range of the longer side of a picture, in pixels: small images are enlarged, so that names stay legible."""

MAX_SCORE_MAPS = 12
"""Score maps of an image and a vocabulary; those of the highest scores are drawn."""


@dataclass(frozen=True)
class Upload:
    """An image of a request.

    Attributes:
        name: name of the file, without its folder.
        pixels: (H, W, 3) uint8 RGB.
    """

    name: str
    pixels: Picture


@dataclass(frozen=True)
class Prediction:
    """What the page shows for one image and one vocabulary.

    Attributes:
        image: name of the file.
        size: (height, width) in pixels.
        line: number of the vocabulary among the typed lines, from 1.
        words: the vocabulary as typed; "" for the model's own classes.
        picture: the output drawn on the image, with a title and a legend.
        score_maps: picture of each score map, with a title, highest score first; empty if the model has none.
        classes: for each class ``name``, ``pixels``, ``share`` of the image in percent, ``mean_score`` over
            these pixels and ``max_score`` over the image, 0..1, and ``segmentation``, a run-length encoding,
            for a class that was found; ``instances`` for a detector. A missing value is None.
    """

    image: str
    size: tuple[int, int]
    line: int
    words: str
    picture: Picture
    score_maps: list[Picture] = field(default_factory=list)
    classes: list[dict[str, Any]] = field(default_factory=list)


def parse_words(text: str, background: str, limits: Limits) -> list[tuple[str, Vocabulary | None, int]]:
    """Parse the words of a request, one vocabulary in each line.

    The words are never taken as the name of a class-list file, unlike in `Vocabulary.parse`: no file of the
    server can be read through them.

    Args:
        text: commas separate classes, bars separate synonyms ("cat|kitten, red car").
        background: background words, which every vocabulary gets; a word that a vocabulary has itself is
            left out.
        limits: of the request.

    Returns:
        For each line its text, the vocabulary with the background classes last (None if there are no words),
        and the number of classes before the background.

    Raises:
        RequestError: If there are too many lines, words or characters, or a vocabulary is wrong.
    """
    if max(len(text), len(background)) > limits.characters:
        raise RequestError(f"Too much text: the limit is {limits.characters} characters.")
    lines = [line.strip() for line in text.splitlines() if line.strip(", \t")]
    if len(lines) > limits.vocabularies:
        raise RequestError(f"{len(lines)} lines of words: the limit is {limits.vocabularies}.")
    rest = _names(background.replace("\n", ","))
    vocabularies: list[tuple[str, Vocabulary | None, int]] = []
    for line in lines:
        names = _names(line)
        known = {name.casefold() for entry in names for name in entry}
        others = [entry for entry in rest if not known & {name.casefold() for name in entry}]
        if len(names) + len(others) > limits.words:
            raise RequestError(
                f"{len(names) + len(others)} words with the background: the limit is {limits.words}."
            )
        try:
            vocabularies.append((line, Vocabulary.from_names([*names, *others]), len(names)))
        except ValueError as error:
            raise RequestError(f"{line}: {error}") from error
    return vocabularies or [("", None, 0)]


def _names(text: str) -> list[list[str]]:
    """Return the synonyms of each class, empty ones left out."""
    entries = [[name.strip() for name in entry.split("|") if name.strip()] for entry in text.split(",")]
    return [entry for entry in entries if entry]


def read_uploads(files: Sequence[str], limits: Limits) -> list[Upload]:
    """Read the images of a request.

    Args:
        files: paths of the uploaded files.
        limits: of the request.

    Raises:
        RequestError: If there are none or too many, or one is too large or not an image. The message names
            the file without its folder.
    """
    if not files:
        raise RequestError("Drop an image first, or press Example scene.")
    if len(files) > limits.images:
        raise RequestError(f"{len(files)} images: the limit is {limits.images}.")
    uploads = []
    for path in files:
        name = Path(path).name
        size = header_size(path)
        if size is not None and size[0] * size[1] > limits.megapixels * 10**6:
            raise RequestError(
                f"{name}: {size[1]} x {size[0]} pixels; the limit is {limits.megapixels} megapixels. "
                "Resize the image."
            )
        try:
            uploads.append(Upload(name, read_image(path, max_pixels=limits.megapixels * 10**6)))
        except (BadImageError, FileNotFoundError) as error:
            raise RequestError(str(error).replace(path, name)) from error
    return uploads


def predict(
    model: ServedModel, uploads: Sequence[Upload], vocabularies: Sequence[tuple[str, Vocabulary | None, int]]
) -> Iterator[Prediction]:
    """Predict every image with every vocabulary, image by image.

    Args:
        model: the model.
        uploads: images.
        vocabularies: result of `parse_words`.

    Raises:
        RequestError: If the words do not fit the model, or an image does not fit into memory.
    """
    for upload in uploads:
        for line, (words, vocabulary, count) in enumerate(vocabularies, 1):
            predictor = model.set_vocabulary(vocabulary)
            (output,) = predictor.batch([upload.pixels])
            if isinstance(output, Exception):
                raise RequestError(f"{upload.name}: {output}") from output
            names = predictor.metadata.get("stuff_classes") or predictor.metadata.get("thing_classes") or ()
            shown = remove_background(output, count) if vocabulary is not None else output
            classes = _Classes(predictor.metadata, names[: count or None])
            yield Prediction(
                upload.name, upload.pixels.shape[:2], line, words, *_draw(upload, output, shown, classes)
            )


@dataclass(frozen=True)
class _Classes:
    """Metadata with the names of all classes, and the names of those before the background."""

    metadata: Any
    names: Sequence[str]


def _draw(
    upload: Upload, output: dict[str, Any], shown: dict[str, Any], classes: _Classes
) -> tuple[Picture, list[Picture], list[dict[str, Any]]]:
    """Draw an output and count its pixels.

    Args:
        upload: the image.
        output: output of the model.
        shown: the output without its background classes.
        classes: names of the classes.

    Returns:
        ``picture``, ``score_maps`` and ``classes`` of a `Prediction`.
    """
    kind, names = output_kind(shown), classes.names
    size = (upload.pixels.shape[0], upload.pixels.shape[1])
    cell = int(np.clip(max(size), MIN_SIDE, MAX_SIDE))
    picture = draw_output(upload.pixels, shown, classes.metadata, cell=cell, kind=kind, legend=True)
    scores = None if output.get("sem_seg") is None else to_array(output["sem_seg"])[: len(names)]
    masks = _class_masks(shown, kind, classes.metadata)
    counts = _instance_counts(shown) if kind == "instances" else None
    rows = [
        _class_row(name, masks.get(k), None if scores is None else scores[k], size)
        | ({} if counts is None else counts.get(k, {"instances": 0, "max_score": None}))
        for k, name in enumerate(names)
    ]
    maps = [] if scores is None else _score_maps(upload, scores, names, cell)
    return add_title(picture, upload.name), maps, rows


def _class_masks(output: dict[str, Any], kind: str, metadata: Any) -> dict[int, npt.NDArray[np.bool_]]:
    """Return the pixels of each class that was found, (H, W)."""
    if kind == "semantic":
        labels = class_labels(output)
        return {int(c): labels == c for c in np.unique(labels) if c >= 0}
    found: dict[int, npt.NDArray[np.bool_]] = {}
    if kind == "panoptic":
        segments = [(s["category_id"], s["mask"]) for s in output_segments(output, kind, metadata)]
    else:
        instances = output["instances"].to("cpu")
        instances = instances[instances.scores >= 0.5]
        if not instances.has("pred_masks"):
            return {}
        masks = to_array(getattr(instances.pred_masks, "tensor", instances.pred_masks)) > 0
        segments = list(zip(instances.pred_classes.tolist(), masks, strict=True))
    for category, mask in segments:
        found[category] = found[category] | mask if category in found else mask
    return found


def _instance_counts(output: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """Return number and best score of the instances of each class that are drawn."""
    instances = output["instances"].to("cpu")
    found: dict[int, dict[str, Any]] = {}
    for category, score in zip(instances.pred_classes.tolist(), instances.scores.tolist(), strict=True):
        row = found.setdefault(category, {"instances": 0, "max_score": 0.0})
        row["instances"] += score >= 0.5
        row["max_score"] = max(row["max_score"], score)
    return found


def _class_row(
    name: str, mask: npt.NDArray[np.bool_] | None, scores: npt.NDArray[Any] | None, size: tuple[int, int]
) -> dict[str, Any]:
    pixels = 0 if mask is None else int(mask.sum())
    row: dict[str, Any] = {"name": name, "pixels": pixels, "share": 100 * pixels / (size[0] * size[1])}
    row["mean_score"] = float(scores[mask].mean()) if scores is not None and pixels else None
    row["max_score"] = None if scores is None else float(scores.max())
    if mask is not None and pixels:
        (row["segmentation"],) = encode_masks(torch.from_numpy(mask)[None])
    return row


def _score_maps(upload: Upload, scores: npt.NDArray[Any], names: Sequence[str], cell: int) -> list[Picture]:
    best = scores.reshape(len(scores), -1).max(1)
    order = np.argsort(-best, kind="stable")[:MAX_SCORE_MAPS]
    return [
        add_title(
            overlay_heat(upload.pixels, scores[k], low=0, high=1, cell=cell),
            f"{names[k]}, up to {best[k]:.2f}: {upload.name}",
        )
        for k in order
    ]


def save_png(predictions: Sequence[Prediction], columns: int, path: Path) -> None:
    """Write the pictures as one PNG: a row for each image, a column for each vocabulary.

    Args:
        predictions: in the order of `predict`.
        columns: number of vocabularies.
        path: file to write.
    """
    pictures = [p.picture for p in predictions]
    rows = [pictures[i : i + columns] for i in range(0, len(pictures), columns)]
    height = sum(max(p.shape[0] for p in row) + GAP for row in rows) - GAP
    width = max(sum(p.shape[1] + GAP for p in row) for row in rows) - GAP
    page = np.full((height, width, 3), 255, np.uint8)
    y = 0
    for row in rows:
        x = 0
        for picture in row:
            page[y : y + picture.shape[0], x : x + picture.shape[1]] = picture
            x += picture.shape[1] + GAP
        y += max(picture.shape[0] for picture in row) + GAP
    save_picture(page, path)


def save_json(model: str, background: str, predictions: Sequence[Prediction], path: Path) -> None:
    """Write the predictions as JSON, with areas, scores and run-length encoded masks of every class.

    Args:
        model: name of the model.
        background: background words as typed.
        predictions: in the order of `predict`.
        path: file to write.
    """
    content = {
        "model": model,
        "background": background,
        "results": [
            {
                "file_name": p.image,
                "height": p.size[0],
                "width": p.size[1],
                "line": p.line,
                "words": p.words,
                "classes": p.classes,
            }
            for p in predictions
        ],
    }
    write_text(path, json_text(content, indent=1) + "\n")
