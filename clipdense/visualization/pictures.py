"""Single pictures: outputs, ground truth, legends, heat maps and score maps."""

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

from clipdense.data.image import read_labels
from clipdense.files import atomic_path
from clipdense.visualization.canvas import Canvas, Picture, fitted, resize
from clipdense.visualization.curves import class_color
from clipdense.visualization.fonts import drawable_name, drawable_text, load_font
from clipdense.visualization.segments import class_labels, output_kind, output_segments, to_array

from detectron2.structures import BitMasks, BoxMode, Instances
from detectron2.utils.visualizer import GenericMask

__all__ = [
    "CELL",
    "GAP",
    "add_title",
    "draw_legend",
    "draw_output",
    "draw_score_map",
    "draw_truth",
    "list_contents",
    "overlay_heat",
    "save_picture",
]

CELL = 512
"""Longer side of an image in a picture, in pixels."""

GAP = 8
"""Space between the parts of a picture, in pixels."""

_TITLE_HEIGHT, _LEGEND_ENTRIES = 26, 40
_PAPER, _INK = (255, 255, 255), (40, 40, 40)


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
    """Draw a model's output on an image.

    Args:
        image: (H, W, 3) uint8 RGB.
        output: output of the model for the image.
        metadata: metadata of the dataset, with its class names.
        score_threshold: instances with a lower score are not drawn, 0..1.
        cell: longer side of the image in the picture, in pixels.
        kind: "panoptic", "instances" or "semantic"; None for the first kind that the output has.
        legend: whether to list the classes and their number or area below the picture.

    Returns:
        Picture (H', W', 3) uint8 RGB.

    Raises:
        ValueError: If the output does not have that kind.
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
            else _binary(to_array(masks.tensor if isinstance(masks, BitMasks) else masks)),
            instances.pred_classes.tolist(),
            metadata,
            instances.scores.tolist(),
        )
    if not legend:
        return canvas.picture()
    return draw_legend(canvas.picture(), list_contents(output, kind, metadata, score_threshold))


def draw_truth(
    image: Picture, record: Mapping[str, Any], metadata: Any, *, cell: int = CELL, kind: str | None = None
) -> Picture:
    """Draw the annotations of a dataset dict on its image.

    Args:
        image: (H, W, 3) uint8 RGB.
        record: Detectron2 dataset dict.
        metadata: metadata of the dataset, with its class names.
        cell: longer side of the picture, in pixels.
        kind: "panoptic", "instances" or "semantic"; the first kind that the record has if it lacks this one.

    Returns:
        Picture (H', W', 3) uint8 RGB.
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
    """Add a legend below a picture.

    Args:
        picture: (H, W, 3) uint8 RGB.
        rows: text and class of each entry; None for an empty square. After 40 entries, the rest is counted.

    Returns:
        Picture (H', W, 3) uint8 RGB.
    """
    if not rows:
        return picture
    if len(rows) > _LEGEND_ENTRIES:
        rows = [*rows[:_LEGEND_ENTRIES], (f"and {len(rows) - _LEGEND_ENTRIES} more", None)]
    size = int(np.clip(picture.shape[1] // 40, 13, 26))
    x, y, width = GAP, GAP, picture.shape[1]
    rows = [(drawable_text(text), category) for text, category in rows]
    places = []
    for text, _ in rows:
        needed = round(1.5 * size + load_font(size, text).getlength(text) + 1.5 * size)
        if x > GAP and x + needed > width:
            x, y = GAP, y + round(1.6 * size)
        places.append((x, y))
        x += needed
    page = Image.new("RGB", (width, y + round(1.6 * size)), _PAPER)
    ink = ImageDraw.Draw(page)
    for (text, category), (x, y) in zip(rows, places, strict=True):
        color = None if category is None else tuple(round(255 * c) for c in class_color(category))
        ink.rectangle((x, y + 2, x + size, y + 2 + size), fill=color, outline=_INK)
        ink.text((x + 1.5 * size, y), text, fill=_INK, font=load_font(size, text))
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
    """Overlay a heat map on an image.

    Args:
        image: (H, W, 3) uint8 RGB.
        heat: values (h, w) of any size and range, resized to the image bilinearly; NaN cells stay clear.
        low, high: values at the ends of the colour map; default: minimum and maximum.
        alpha: weight of the colours, 0..1.
        colormap: name of a matplotlib colour map.
        cell: longer side of the result, in pixels.

    Returns:
        Picture (H', W', 3) uint8 RGB.
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
    """Overlay the scores of one class on an image, with a title and the range of the scores above it.

    Args:
        image: (H, W, 3) uint8 RGB.
        score: scores (h, w) of any size and range, over the whole image.
        path: file to write; None writes no file.
        title: name of the class.
        low, high: scores at the blue and the red end; default: minimum and maximum. Use the same two values
            for several classes to compare them.
        cell: longer side of the image in the picture, in pixels.

    Returns:
        Picture (H', W', 3) uint8 RGB.
    """
    values = to_array(score)
    heat = overlay_heat(image, values, low=low, high=high, cell=cell)
    picture = add_title(heat, f"{title}  {values.min():.2f} to {values.max():.2f}".strip())
    if path is not None:
        save_picture(picture, path)
    return picture


def list_contents(
    output: Mapping[str, Any], kind: str, metadata: Any, threshold: float
) -> list[tuple[str, int | None]]:
    """List the classes of an output with their number or area.

    Args:
        output: output of a model for one image.
        kind: "panoptic", "instances" or "semantic".
        metadata: metadata of the dataset, with its class names.
        threshold: instances with a lower score are not counted, 0..1.

    Returns:
        Text and class (None for pixels without a class), largest number or area first; "nothing found" if the
        output is empty.
    """
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
        name = drawable_name(names[category], category) if category < len(names) else str(category)
        number = f"{count[category]} \u00d7 " if count[category] else ""
        rows.append((number + name + (f"  {100 * amount / total:.0f}%" if area else ""), category))
    if kind != "instances" and (rest := total - area.total()):
        rows.append((f"unlabelled  {100 * rest / total:.0f}%", None))
    return [("nothing found", None)] if not (area or count) else rows


def add_title(picture: Picture, title: str) -> Picture:
    """Add a line of text above a picture."""
    strip, title = Image.new("RGB", (picture.shape[1], _TITLE_HEIGHT), _PAPER), drawable_text(title)
    ImageDraw.Draw(strip).text((2, 4), title, fill=_INK, font=load_font(15, title))
    return np.concatenate([np.asarray(strip), picture])


def _binary(masks: npt.NDArray[Any]) -> list[npt.NDArray[np.bool_]]:
    """Convert masks (N, H, W) to N masks (H, W) bool; those of type bool are not copied."""
    return list(masks if masks.dtype == np.bool_ else masks > 0)


def save_picture(picture: Picture, path: str | os.PathLike[str]) -> None:
    """Write a picture (H, W, 3) uint8 RGB atomically, as JPEG if the path ends in ``.jpg``, else as PNG."""
    with atomic_path(path) as part:
        if os.fspath(path).lower().endswith(".jpg"):
            Image.fromarray(picture).save(part, format="JPEG", quality=90)
        else:
            Image.fromarray(picture).save(part, format="PNG", compress_level=1)
