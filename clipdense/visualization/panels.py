"""Grids of pictures: predictions beside ground truth, and score maps.

Pictures are drawn on enlarged images, so that 256-pixel images stay legible. A class has the same colour in
every picture of a dataset.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from clipdense.data.image import read_image
from clipdense.visualization.canvas import Picture, fitted, resize
from clipdense.visualization.pictures import (
    CELL,
    GAP,
    add_title,
    draw_output,
    draw_score_map,
    draw_truth,
    save_picture,
)
from clipdense.visualization.segments import output_kind

__all__ = ["draw_panel", "draw_score_panel", "draw_sheet"]


def draw_panel(
    records: Sequence[Mapping[str, Any]],
    metadata: Any,
    path: str | os.PathLike[str],
    *,
    score_threshold: float = 0.5,
    columns: int = 2,
    cell: int = CELL,
) -> None:
    """Draw a grid of images with their ground truth on the left and the prediction on the right, as a PNG.

    Args:
        records: Detectron2 dataset dicts (``file_name``, or the image itself under ``image`` as (H, W, 3)
            uint8 RGB; ``annotations``, ``sem_seg_file_name``, or ``pan_seg_file_name`` with
            ``segments_info``), with a model's output for the original image size under ``output``:
            ``instances``, ``panoptic_seg``, ``sem_seg`` or ``sem_seg_labels``.
        metadata: metadata of the dataset, with its class names.
        path: file to write.
        score_threshold: instances with a lower score are not drawn, 0..1.
        columns: number of pairs per row.
        cell: longer side of an image in the grid, in pixels.

    Raises:
        ValueError: If there are no records, or an output cannot be drawn.
    """
    tiles = []
    for record in records:
        image = _image(record)
        left = draw_truth(image, record, metadata, cell=cell, kind=output_kind(record["output"]))
        right = draw_output(image, record["output"], metadata, score_threshold=score_threshold, cell=cell)
        name = os.path.basename(str(record.get("file_name", record.get("image_id", ""))))
        tiles.append(
            _beside(
                add_title(left, f"{name}  ground truth"),
                add_title(right, _describe(record["output"], score_threshold)),
            )
        )
    save_picture(_grid(tiles, columns), path)


def draw_sheet(
    records: Sequence[Mapping[str, Any]],
    metadata: Any,
    path: str | os.PathLike[str],
    *,
    columns: int = 6,
    cell: int = 256,
) -> None:
    """Draw a contact sheet: images with their ground truth, as a PNG.

    Args:
        records: Detectron2 dataset dicts, see `draw_panel`; without annotations, the image alone is drawn.
        metadata: metadata of the dataset, with its class names.
        path: file to write.
        columns: number of images per row.
        cell: longer side of an image, in pixels.

    Raises:
        ValueError: If there are no records.
    """
    tiles = [
        add_title(draw_truth(_image(record), record, metadata, cell=cell), Path(record["file_name"]).name)
        for record in records
    ]
    save_picture(_grid(tiles, columns), path)


def draw_score_panel(
    records: Sequence[Mapping[str, Any]],
    scores: Sequence[npt.NDArray[np.floating]],
    classes: Sequence[str],
    path: str | os.PathLike[str],
    *,
    shown: int = 2,
    cell: int = CELL,
) -> None:
    """Draw each image and the score maps of its largest ground-truth classes in a row, as a PNG.

    A map shows how far the score of its class exceeds the mean score of all classes at a position; the maps
    of an image share one colour scale.

    Args:
        records: Detectron2 dataset dicts; without ``annotations``, the classes with the highest scores are
            shown.
        scores: scores (K, h, w) over each image.
        classes: K class names.
        path: file to write.
        shown: number of score maps per image.
        cell: longer side of an image, in pixels.

    Raises:
        ValueError: If there are no records.
    """
    tiles = []
    for record, score in zip(records, scores, strict=True):
        image = _image(record)
        name = os.path.basename(str(record.get("file_name", record.get("image_id", ""))))
        tiles.append(add_title(resize(image, fitted(image, cell), cv2.INTER_CUBIC), name))
        rows = sorted(record.get("annotations", ()), key=lambda row: -row["bbox"][2] * row["bbox"][3])
        best = np.argsort(-score.max(axis=(1, 2)))
        chosen = list(dict.fromkeys([*(row["category_id"] for row in rows), *best]))[:shown]
        # Classes differ by less than positions do: their common part is removed, and all share one scale.
        relative = score - score.mean(axis=0)
        low, high = float(relative.min()), float(relative.max())
        tiles += [
            draw_score_map(image, relative[k], title=classes[k], low=low, high=high, cell=cell)
            for k in chosen
        ]
    save_picture(_grid(tiles, 1 + shown), path)


def _describe(output: Mapping[str, Any], threshold: float) -> str:
    if output_kind(output) != "instances":
        return "prediction"
    shown = int((output["instances"].scores >= threshold).sum())
    return f"prediction  {shown} with score \u2265 {threshold:g}"


def _image(record: Mapping[str, Any]) -> Picture:
    if isinstance(record.get("image"), np.ndarray):
        return np.asarray(record["image"])
    size = (record["height"], record["width"]) if "height" in record and "width" in record else None
    return read_image(record["file_name"], size=size)


def _beside(left: Picture, right: Picture) -> Picture:
    height = max(left.shape[0], right.shape[0])
    gap = np.full((height, GAP, 3), 255, np.uint8)
    return np.concatenate(
        [_padded(left, height, left.shape[1]), gap, _padded(right, height, right.shape[1])], axis=1
    )


def _padded(picture: Picture, height: int, width: int) -> Picture:
    page = np.full((height, width, 3), 255, np.uint8)
    page[: picture.shape[0], : picture.shape[1]] = picture
    return page


def _grid(tiles: list[Picture], columns: int) -> Picture:
    if not tiles:
        raise ValueError("a panel needs at least one image")
    columns = min(columns, len(tiles))
    rows = [tiles[i : i + columns] for i in range(0, len(tiles), columns)]
    width = max(tile.shape[1] for tile in tiles)
    strips = []
    for row in rows:
        height = max(tile.shape[0] for tile in row) + 2 * GAP
        cells = [np.pad(tile, ((GAP, 0), (2 * GAP, 0), (0, 0)), constant_values=255) for tile in row]
        cells = [_padded(cell, height, width + 2 * GAP) for cell in cells]
        strips.append(_padded(np.concatenate(cells, axis=1), height, columns * (width + 2 * GAP) + 2 * GAP))
    return np.concatenate(strips)
