"""Prediction on the files of a command: pictures and results, one line for each image."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from tqdm import tqdm

from clipdense.clip.vocabulary import near
from clipdense.data.image import read_image
from clipdense.files import json_text
from clipdense.run.inputs import Inputs
from clipdense.run.memory import is_out_of_memory
from clipdense.run.outputs import OutputFolder
from clipdense.run.prediction import Prediction
from clipdense.run.predictor import Predictor
from clipdense.run.videos import Video, VideoWriter
from clipdense.visualization.pictures import draw_score_map

__all__ = ["PredictionSettings", "check_score_classes", "predict_inputs"]


@dataclass(frozen=True)
class PredictionSettings:
    """How files are predicted.

    Attributes:
        kind: "panoptic", "instances" or "semantic"; "": the first that the model has.
        batch_size: images in a batch.
        tile: side of tiles in pixels for larger images; 0: no tiles.
        score_maps: classes whose score maps are drawn too (models with a language backbone).
        max_frames: frames of each video or camera; 0: all.
    """

    kind: str = ""
    batch_size: int = 1
    tile: int = 0
    score_maps: tuple[str, ...] = ()
    max_frames: int = 0


def predict_inputs(
    predictor: Predictor, inputs: Inputs, outputs: OutputFolder, settings: PredictionSettings
) -> int:
    """Predict on all inputs, write the outputs, and print a line for each image and a summary.

    An image that fails does not stop the others; failures are listed at the end on stderr.

    Args:
        predictor: the model.
        inputs: see `find_inputs`.
        outputs: gets the predictions; it is closed, also if the run is interrupted.
        settings: see `PredictionSettings`.

    Returns:
        The exit status: 1 if an input failed, else 0.
    """
    start, frames = time.perf_counter(), 0
    kind = ""
    with outputs:
        outputs.failed |= inputs.failed
        for prediction in _images(predictor, inputs.images, outputs.failed, settings):
            kind = prediction.kind
            _write(predictor, prediction, outputs, settings)
        sources: list[str | Path | int] = [*inputs.videos, *inputs.cameras]
        for source in sources:
            try:
                frames += _video(predictor, Video(source), outputs, settings)
            except OSError as error:
                name = f"camera:{source}" if isinstance(source, int) else str(source)
                outputs.failed[name] = str(error)
    counts = [f"{outputs.num_images} images"] if inputs.images or not frames else []
    counts += [f"{frames} frames"] if frames else []
    if inputs.images:
        counts.append(f"{outputs.num_annotations} detections")
    if kind not in ("", "instances"):
        counts.append(f"{outputs.num_segments} segments")
    counts += [f"{inputs.skipped} other files skipped"] if inputs.skipped else []
    earlier = f" (the files of an earlier run are in {outputs.retired})" if outputs.retired else ""
    print(f"{', '.join(counts)}, {time.perf_counter() - start:.1f} seconds: {outputs.path}{earlier}")
    for name, why in outputs.failed.items():
        print(f"failed: {why if name in why else f'{name}: {why}'}", file=sys.stderr)
    return 1 if outputs.failed else 0


def check_score_classes(names: Iterable[str], predictor: Predictor) -> None:
    """Raise ValueError if the model has no score maps, or none of a class."""
    for name in names:
        known = predictor.score_classes
        if name not in known:
            hint = near(name, known) or known[:10]
            raise ValueError(
                f"--score-map: {name!r} is not a class of this model; similar: {', '.join(hint)}"
            )


def _images(
    predictor: Predictor, paths: list[Path], failed: dict[str, str], settings: PredictionSettings
) -> Iterator[Prediction]:
    """Yield the predictions of the images that can be read and fit into memory."""
    if settings.tile:
        outputs: Iterable[Any] = (_tiled(predictor, path, settings.tile) for path in paths)
    else:
        outputs = predictor.batch(paths, settings.batch_size)
    for path, output in zip(paths, outputs, strict=True):
        if isinstance(output, Exception):
            failed[str(path)] = str(output)
            continue
        pixels = read_image(path, max_pixels=predictor.max_pixels)
        yield predictor.wrap(pixels, output, settings.kind, str(path))


def _tiled(predictor: Predictor, path: Path, tile: int) -> Any:
    try:
        return predictor.predict_pixels([read_image(path, max_pixels=predictor.max_pixels)], tile)[0]
    except OSError as error:
        return error


def _write(
    predictor: Predictor, prediction: Prediction, outputs: OutputFolder, settings: PredictionSettings
) -> None:
    """Write the outputs of one image, and print what was found."""
    try:
        picture = outputs.add(prediction)
        for name, draw in _score_maps(predictor, prediction, settings.score_maps):
            draw(outputs.take(f"{Path(prediction.source).stem}_{name}"))
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        outputs.failed[prediction.source] = "not enough memory to draw this image: reduce its size"
        return
    arrow = "" if picture is None else f" -> {picture}"
    tqdm.write(f"{prediction.source}: {prediction.describe()}{arrow}")


def _score_maps(
    predictor: Predictor, prediction: Prediction, names: tuple[str, ...]
) -> Iterator[tuple[str, Callable[[Path], None]]]:
    """Yield a class and the function that draws its score map; all maps share the range of the colours."""
    if not names:
        return
    scores, classes = predictor.score_map(prediction.image)
    low, high = float(scores.min()), float(scores.max())
    for name in names:
        values = scores[classes.index(name)]

        def draw(path: Path, values: Any = values, name: str = name) -> None:
            side = prediction.picture_side
            draw_score_map(prediction.image, values, path, title=name, low=low, high=high, cell=side)

        yield name, draw


def _video(predictor: Predictor, video: Video, outputs: OutputFolder, settings: PredictionSettings) -> int:
    """Predict on the frames of a video: an .mp4 of the same rate, and a JSON line for each frame.

    Returns:
        The number of frames.
    """
    stem = Path(video.name).stem.replace(":", "_")
    limit = settings.max_frames or None
    total = min(filter(None, (settings.max_frames, video.num_frames)), default=None)
    lines = outputs.take(stem, ".jsonl")
    count = 0
    with (
        VideoWriter(outputs.take(stem, ".mp4"), video.rate) as writer,
        lines.open("w", encoding="utf-8") as file,
    ):
        frames = tqdm(islice(video, limit), video.name, total, unit="frame", disable=None)
        for number, found in enumerate(
            predictor.stream(frames, settings.kind, settings.batch_size, settings.tile)
        ):
            prediction = replace(found, source=video.name, frame=number)
            rows = prediction.annotations() if prediction.kind == "instances" else prediction.segments()
            content = {"frame": number, "time": number / video.rate, "objects": rows}
            file.write(json_text(content) + "\n")
            if "csv" in outputs.formats:
                outputs.summarize(prediction)
            writer.add(prediction.plot(legend=False))
            count += 1
    tqdm.write(f"{video.name}: {count} frames of {video.rate:.3g} a second -> {writer.path}")
    return count
