"""Pictures: predictions beside ground truth, contact sheets, training curves, score maps.

Drawn with Detectron2's `Visualizer` on enlarged images, so that 256-pixel scenes stay legible; a class has
the same colour in every picture of a data set.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import cv2
import matplotlib
import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw

from clipdense.data.image import read_image, read_labels
from clipdense.files import atomic_path
from clipdense.visualization.canvas import Canvas, Picture, fitted, load_font, resize
from clipdense.visualization.curves import class_color, draw_curve
from clipdense.visualization.segments import class_labels, output_kind, output_segments, to_array

from detectron2.structures import BitMasks, BoxMode, Instances
from detectron2.utils.visualizer import GenericMask

__all__ = [
    "class_color",
    "draw_curve",
    "draw_legend",
    "draw_output",
    "draw_panel",
    "draw_score_panel",
    "draw_score_map",
    "draw_sheet",
    "draw_truth",
    "overlay_heat",
    "save_picture",
]

CELL = 512
"""Longer side of an image in a grid, in pixels."""

_GAP, _TITLE, _ROWS = 8, 26, 40
_PAPER, _INK = (255, 255, 255), (40, 40, 40)


# ---- grids
# ---------------------------------------------------------------------------------------------------------


def draw_panel(
    records: Sequence[Mapping[str, Any]],
    metadata: Any,
    path: str | os.PathLike[str],
    *,
    score_threshold: float = 0.5,
    columns: int = 2,
    cell: int = CELL,
) -> None:
    """A grid with the ground truth of each image on the left and what a model says on the right, as a PNG.

    Args:
        records: Detectron2 dataset dicts (``file_name``, or the image itself under ``image`` as (H, W, 3)
            uint8 RGB; ``annotations``, ``sem_seg_file_name``, or ``pan_seg_file_name`` with
            ``segments_info``), with a model's output for the original image size under ``output``:
            ``instances``, ``panoptic_seg``, ``sem_seg`` or ``sem_seg_labels``.
        metadata: of the data set: class names.
        path: file to write.
        score_threshold: instances below it are not drawn, 0..1.
        columns: images side by side, each of them a pair.
        cell: longer side of an image in the grid, in pixels.

    Raises:
        ValueError: no records, or an output that cannot be drawn.
    """
    tiles = []
    for record in records:
        image = _image(record)
        left = draw_truth(image, record, metadata, cell=cell, kind=output_kind(record["output"]))
        right = draw_output(image, record["output"], metadata, score_threshold=score_threshold, cell=cell)
        name = os.path.basename(str(record.get("file_name", record.get("image_id", ""))))
        tiles.append(
            _beside(
                _titled(left, f"{name}  truth"), _titled(right, _describe(record["output"], score_threshold))
            )
        )
    save_picture(_grid(tiles, columns), path)


def draw_sheet(
    records: Sequence[Mapping[str, Any]],
    metadata: Any,
    path: str | os.PathLike[str],
    *,
    columns: int = 4,
    cell: int = CELL,
    titles: Sequence[str] | None = None,
) -> None:
    """A contact sheet: images with their annotations (boxes, masks, names), as a PNG.

    Args:
        records: as for `draw_panel`; ``output`` is not looked at.
        metadata: of the data set: class names.
        path: file to write.
        columns: images side by side.
        cell: longer side of an image, in pixels.
        titles: a line above each image.

    Raises:
        ValueError: no records.
    """
    tiles = [draw_truth(_image(record), record, metadata, cell=cell) for record in records]
    if titles is not None:
        tiles = [_titled(tile, title) for tile, title in zip(tiles, titles, strict=True)]
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
    """A row for each image: the image, and the score maps of the largest classes in its truth, as a PNG.

    Args:
        records: Detectron2 dataset dicts; without ``annotations`` the classes of highest score are shown.
        scores: a (K, h, w) map over each image.
        classes: K names.
        path: file to write.
        shown: score maps an image.
        cell: longer side of an image, in pixels.

    Raises:
        ValueError: no records.
    """
    tiles = []
    for record, score in zip(records, scores, strict=True):
        image = _image(record)
        name = os.path.basename(str(record.get("file_name", record.get("image_id", ""))))
        tiles.append(_titled(resize(image, fitted(image, cell), cv2.INTER_CUBIC), name))
        rows = sorted(record.get("annotations", ()), key=lambda row: -row["bbox"][2] * row["bbox"][3])
        best = np.argsort(-score.max(axis=(1, 2)))
        chosen = list(dict.fromkeys([*(row["category_id"] for row in rows), *best]))[:shown]
        tiles += [draw_score_map(image, score[k], title=classes[k], cell=cell) for k in chosen]
    save_picture(_grid(tiles, 1 + shown), path)


# ---- single pictures
# -----------------------------------------------------------------------------------------------


def draw_output(
    image: Picture,
    output: Mapping[str, Any],
    metadata: Any,
    *,
    score_threshold: float = 0.5,
    cell: int = CELL,
    kind: str | None = None,
    legend: bool = False,
) -> Picture:
    """An image with a model's output on it.

    Args:
        image: (H, W, 3) uint8 RGB.
        output: what the model gives for it.
        metadata: class names.
        score_threshold: instances below it are not drawn, 0..1.
        cell: longer side of the image in the picture, in pixels.
        kind: what is drawn: "panoptic", "instances" or "semantic"; by default the first that is there.
        legend: whether to name below the picture what is in it, and how much of it.

    Returns:
        (H', W', 3) uint8 RGB.

    Raises:
        ValueError: an output without what is to be drawn.
    """
    canvas = Canvas(image, cell)
    kind = output_kind(output, kind)
    if kind == "panoptic":
        segmentation, segments = output["panoptic_seg"]
        canvas.panoptic(to_array(segmentation), segments, metadata)
    elif kind == "semantic":
        canvas.labels(class_labels(output), metadata)
    else:
        instances: Instances = output["instances"].to("cpu")
        instances = instances[instances.scores >= score_threshold]
        masks = instances.pred_masks if instances.has("pred_masks") else None
        canvas.things(
            instances.pred_boxes.tensor.numpy() if instances.has("pred_boxes") else None,
            None
            if masks is None
            else list(to_array(masks.tensor if isinstance(masks, BitMasks) else masks) > 0),
            instances.pred_classes.tolist(),
            metadata,
            instances.scores.tolist(),
        )
    if not legend:
        return canvas.picture()
    return draw_legend(canvas.picture(), _contents(output, kind, metadata, score_threshold))


def draw_truth(
    image: Picture, record: Mapping[str, Any], metadata: Any, *, cell: int = CELL, kind: str | None = None
) -> Picture:
    """An image (H, W, 3) uint8 RGB with the annotations of its dataset dict, enlarged or reduced to `cell`
    pixels.

    `kind` chooses among several: "panoptic", "instances", "semantic"; by default the first that is there.
    """
    canvas = Canvas(image, cell)
    kinds = {"panoptic": "pan_seg_file_name", "instances": "annotations", "semantic": "sem_seg_file_name"}
    present = [name for name, key in kinds.items() if record.get(key)]
    chosen = kind if kind in present else next(iter(present), None)
    if chosen == "panoptic":
        canvas.panoptic(read_labels(record["pan_seg_file_name"]), record["segments_info"], metadata)
    elif chosen == "semantic":
        canvas.labels(read_labels(record["sem_seg_file_name"]), metadata)
    elif chosen == "instances":
        rows = [row for row in record["annotations"] if not row.get("iscrowd")]
        boxes = [BoxMode.convert(list(row["bbox"]), row["bbox_mode"], BoxMode.XYXY_ABS) for row in rows]
        masked = bool(rows) and all(row.get("segmentation") is not None for row in rows)
        size = image.shape[:2]
        masks = [GenericMask(row["segmentation"], *size).mask > 0 for row in rows] if masked else None
        canvas.things(np.array(boxes).reshape(-1, 4), masks, [row["category_id"] for row in rows], metadata)
    return canvas.picture()


def draw_legend(picture: Picture, rows: Sequence[tuple[str, int | None]]) -> Picture:
    """The picture with classes named below it, each beside a square of its colour.

    Args:
        picture: (H, W, 3) uint8 RGB.
        rows: a text and its class; None for an empty square. Beyond 40 they are counted only.
    """
    if not rows:
        return picture
    if len(rows) > _ROWS:
        rows = [*rows[:_ROWS], (f"and {len(rows) - _ROWS} more", None)]
    size = int(np.clip(picture.shape[1] // 40, 13, 26))
    font, x, y, width = load_font(size), _GAP, _GAP, picture.shape[1]
    places = []
    for text, _ in rows:
        needed = round(1.5 * size + font.getlength(text) + 1.5 * size)
        if x > _GAP and x + needed > width:
            x, y = _GAP, y + round(1.6 * size)
        places.append((x, y))
        x += needed
    page = Image.new("RGB", (width, y + round(1.6 * size)), _PAPER)
    ink = ImageDraw.Draw(page)
    for (text, category), (x, y) in zip(rows, places, strict=True):
        color = None if category is None else tuple(round(255 * c) for c in class_color(category))
        ink.rectangle((x, y + 2, x + size, y + 2 + size), fill=color, outline=_INK)
        ink.text((x + 1.5 * size, y), text, fill=_INK, font=font)
    return np.concatenate([picture, np.asarray(page)])


def overlay_heat(
    image: Picture,
    heat: npt.NDArray[np.floating] | torch.Tensor,
    *,
    low: float | None = None,
    high: float | None = None,
    alpha: float = 0.55,
    colormap: str = "turbo",
    cell: int = CELL,
) -> Picture:
    """A heat map laid over an image.

    Args:
        image: (H, W, 3) uint8 RGB.
        heat: (h, w) of any size and range, enlarged to the image bilinearly; cells that are NaN stay clear.
        low, high: values at the two ends of the colours; by default the least and the greatest.
        alpha: weight of the colours, 0..1.
        colormap: a name that matplotlib knows.
        cell: longer side of the result, in pixels.

    Returns:
        (H', W', 3) uint8 RGB.
    """
    values = to_array(heat).astype(np.float64)
    known = np.isfinite(values)
    low = float(values[known].min(initial=np.inf)) if low is None else low
    high = float(values[known].max(initial=-np.inf)) if high is None else high
    background = resize(image, fitted(image, cell), cv2.INTER_CUBIC)
    share = np.where(known, (values - low) / max(high - low, 1e-12), 0).clip(0, 1)
    weight = alpha * resize(known.astype(np.float32), background.shape[:2], cv2.INTER_LINEAR)[..., None]
    share = resize(share.astype(np.float32), background.shape[:2], cv2.INTER_LINEAR)
    colors = 255 * matplotlib.colormaps[colormap](share)[..., :3]
    return np.asarray((1 - weight) * background + weight * colors).round().clip(0, 255).astype(np.uint8)


def draw_score_map(
    image: Picture,
    score: npt.NDArray[np.floating] | torch.Tensor,
    path: str | os.PathLike[str] | None = None,
    *,
    title: str = "",
    low: float | None = None,
    high: float | None = None,
    cell: int = CELL,
) -> Picture:
    """The scores of one class laid over the image, with a title and their range above.

    Args:
        image: (H, W, 3) uint8 RGB.
        score: (h, w) of any size and range, over the whole image.
        path: file to write; None for none.
        title: the class.
        low, high: scores at the blue and the red end; by default the least and the greatest. Give several
            classes the same two to compare them.
        cell: longer side of the image in the picture, in pixels.

    Returns:
        (H', W', 3) uint8 RGB.
    """
    values = to_array(score)
    heat = overlay_heat(image, values, low=low, high=high, cell=cell)
    picture = _titled(heat, f"{title}  {values.min():.2f} to {values.max():.2f}".strip())
    if path is not None:
        save_picture(picture, path)
    return picture


def _contents(
    output: Mapping[str, Any], kind: str, metadata: Any, threshold: float
) -> list[tuple[str, int | None]]:
    """What is in an output: a text and its class, or None for what has none; the most first."""
    names = metadata.get("stuff_classes") or ()
    if kind == "instances":
        names = metadata.get("thing_classes") or names
    count: Counter[int] = Counter()
    area: Counter[int] = Counter()
    total = 1
    if kind == "instances":
        instances = output["instances"]
        count.update(instances.pred_classes[instances.scores >= threshold].tolist())
    else:
        for segment in output_segments(output, kind, metadata):
            category, total = segment["category_id"], segment["mask"].size
            count[category] += segment.get("isthing", False)
            area[category] += int(segment["mask"].sum())
    rows: list[tuple[str, int | None]] = []
    for category, amount in (area or count).most_common():
        name = names[category] if category < len(names) else str(category)
        number = f"{count[category]} \u00d7 " if count[category] else ""
        rows.append((number + name + (f"  {100 * amount / total:.0f}%" if area else ""), category))
    if kind != "instances" and (rest := total - area.total()):
        rows.append((f"unlabelled  {100 * rest / total:.0f}%", None))
    return rows


def _describe(output: Mapping[str, Any], threshold: float) -> str:
    if output_kind(output) != "instances":
        return "prediction"
    shown = int((output["instances"].scores >= threshold).sum())
    return f"prediction  {shown} with score \u2265 {threshold:g}"


# ---- layout
# --------------------------------------------------------------------------------------------------------


def _image(record: Mapping[str, Any]) -> Picture:
    if isinstance(record.get("image"), np.ndarray):
        return np.asarray(record["image"])
    return read_image(record["file_name"])


def _titled(picture: Picture, title: str) -> Picture:
    """The picture with a line of text above it."""
    strip = Image.new("RGB", (picture.shape[1], _TITLE), _PAPER)
    ImageDraw.Draw(strip).text((2, 4), title, fill=_INK, font=load_font(15))
    return np.concatenate([np.asarray(strip), picture])


def _beside(left: Picture, right: Picture) -> Picture:
    height = max(left.shape[0], right.shape[0])
    gap = np.full((height, _GAP, 3), 255, np.uint8)
    return np.concatenate(
        [_padded(left, height, left.shape[1]), gap, _padded(right, height, right.shape[1])], axis=1
    )


def _padded(picture: Picture, height: int, width: int) -> Picture:
    page = np.full((height, width, 3), 255, np.uint8)
    page[: picture.shape[0], : picture.shape[1]] = picture
    return page


def _grid(tiles: list[Picture], columns: int) -> Picture:
    if not tiles:
        raise ValueError("nothing to draw: there are no images")
    columns = min(columns, len(tiles))
    rows = [tiles[i : i + columns] for i in range(0, len(tiles), columns)]
    width = max(tile.shape[1] for tile in tiles)
    strips = []
    for row in rows:
        height = max(tile.shape[0] for tile in row) + 2 * _GAP
        cells = [np.pad(tile, ((_GAP, 0), (2 * _GAP, 0), (0, 0)), constant_values=255) for tile in row]
        cells = [_padded(cell, height, width + 2 * _GAP) for cell in cells]
        strips.append(_padded(np.concatenate(cells, axis=1), height, columns * (width + 2 * _GAP) + 2 * _GAP))
    return np.concatenate(strips)


def save_picture(picture: Picture, path: str | os.PathLike[str]) -> None:
    """Write (H, W, 3) uint8 RGB whole or not at all, as JPEG where the path ends in ``.jpg``, else as PNG."""
    with atomic_path(path) as part:
        if os.fspath(path).lower().endswith(".jpg"):
            Image.fromarray(picture).save(part, format="JPEG", quality=90)
        else:
            Image.fromarray(picture).save(part, format="PNG", optimize=True)
