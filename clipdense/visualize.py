"""Pictures: predictions beside ground truth, contact sheets, training curves, score maps.

Drawn with Detectron2's `Visualizer` on enlarged images, so that 256-pixel scenes stay legible; a class has
the same colour in every picture of a data set.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import cv2
import matplotlib
import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw, ImageFont

from clipdense.curve import class_color, draw_curve
from clipdense.data.image import read_image, read_labels

from detectron2.structures import BitMasks, BoxMode, Instances
from detectron2.utils.visualizer import GenericMask, Visualizer

__all__ = [
    "class_color",
    "draw_curve",
    "draw_output",
    "draw_panel",
    "draw_score_panel",
    "draw_score_map",
    "draw_sheet",
    "draw_truth",
    "overlay_heat",
    "save_picture",
]

Picture = npt.NDArray[np.uint8]
Color = tuple[float, float, float]

CELL = 512
"""Longer side of an image in a grid, in pixels."""

_GAP, _TITLE = 8, 26
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
        left = draw_truth(image, record, metadata, cell=cell, kind=_kind(record["output"]))
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
        tiles.append(_titled(_resize(image, _size(image, cell), cv2.INTER_CUBIC), name))
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
) -> Picture:
    """An image (H, W, 3) uint8 RGB with a model's output on it, enlarged or reduced to `cell` pixels."""
    canvas = _Canvas(image, cell)
    kind = _kind(output)
    if kind == "panoptic_seg":
        segmentation, segments = output["panoptic_seg"]
        canvas.panoptic(_array(segmentation), segments, metadata)
    elif kind == "sem_seg":
        labels = output["sem_seg_labels"] if "sem_seg_labels" in output else output["sem_seg"].argmax(dim=0)
        canvas.labels(_array(labels), metadata)
    else:
        instances: Instances = output["instances"].to("cpu")
        instances = instances[instances.scores >= score_threshold]
        masks = instances.pred_masks if instances.has("pred_masks") else None
        canvas.things(
            instances.pred_boxes.tensor.numpy() if instances.has("pred_boxes") else None,
            None
            if masks is None
            else list(_array(masks.tensor if isinstance(masks, BitMasks) else masks) > 0),
            instances.pred_classes.tolist(),
            metadata,
            instances.scores.tolist(),
        )
    return canvas.picture()


def draw_truth(
    image: Picture, record: Mapping[str, Any], metadata: Any, *, cell: int = CELL, kind: str | None = None
) -> Picture:
    """An image (H, W, 3) uint8 RGB with the annotations of its dataset dict, enlarged or reduced to `cell`
    pixels.

    `kind` chooses among several: ``"instances"``, ``"panoptic_seg"``, ``"sem_seg"``; by default the first
        that is there.
    """
    canvas = _Canvas(image, cell)
    kinds = {"panoptic_seg": "pan_seg_file_name", "instances": "annotations", "sem_seg": "sem_seg_file_name"}
    present = [name for name, key in kinds.items() if record.get(key)]
    chosen = kind if kind in present else next(iter(present), None)
    if chosen == "panoptic_seg":
        canvas.panoptic(read_labels(record["pan_seg_file_name"]), record["segments_info"], metadata)
    elif chosen == "sem_seg":
        canvas.labels(read_labels(record["sem_seg_file_name"]), metadata)
    elif chosen == "instances":
        rows = [row for row in record["annotations"] if not row.get("iscrowd")]
        boxes = [BoxMode.convert(list(row["bbox"]), row["bbox_mode"], BoxMode.XYXY_ABS) for row in rows]
        masked = bool(rows) and all(row.get("segmentation") is not None for row in rows)
        size = image.shape[:2]
        masks = [GenericMask(row["segmentation"], *size).mask > 0 for row in rows] if masked else None
        canvas.things(np.array(boxes).reshape(-1, 4), masks, [row["category_id"] for row in rows], metadata)
    return canvas.picture()


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
    values = _array(heat).astype(np.float64)
    known = np.isfinite(values)
    low = float(values[known].min(initial=np.inf)) if low is None else low
    high = float(values[known].max(initial=-np.inf)) if high is None else high
    background = _resize(image, _size(image, cell), cv2.INTER_CUBIC)
    share = np.where(known, (values - low) / max(high - low, 1e-12), 0).clip(0, 1)
    weight = alpha * _resize(known.astype(np.float32), background.shape[:2], cv2.INTER_LINEAR)[..., None]
    share = _resize(share.astype(np.float32), background.shape[:2], cv2.INTER_LINEAR)
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
    values = _array(score)
    heat = overlay_heat(image, values, low=low, high=high, cell=cell)
    picture = _titled(heat, f"{title}  {values.min():.2f} to {values.max():.2f}".strip())
    if path is not None:
        save_picture(picture, path)
    return picture


class _Canvas:
    """An image, resized, with Detectron2's Visualizer on it; names are placed last, where they hide least."""

    def __init__(self, image: Picture, cell: int) -> None:
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
            raise ValueError(f"expected an image (H, W, 3) of uint8, got {image.shape} of {image.dtype}")
        self._original = image.shape[:2]
        self._shape = _size(image, cell)
        self._visualizer = Visualizer(_resize(image, self._shape, cv2.INTER_CUBIC))
        self._font_size = max(11, round(cell / 38))
        self._names: list[tuple[str, Color, list[tuple[float, float]]]] = []

    def picture(self) -> Picture:
        """The drawing, (H', W', 3) uint8 RGB."""
        taken: list[tuple[float, float, float, float]] = []
        font = _font(self._font_size)
        for name, color, places in self._names:
            width, height = font.getlength(name) + 4, 1.35 * self._font_size
            corners = [self._inside(x, y, width, height) for x, y in places]
            boxes = [(x, y, x + width, y + height) for x, y in corners]
            best = min(boxes, key=lambda box: sum(_overlap(box, other) for other in taken))
            taken.append(best)
            self._visualizer.draw_text(
                name,
                (best[0] + 2, best[1] + 2),
                font_size=self._font_size * 72 / self._visualizer.output.fig.dpi,
                color=tuple(0.45 + 0.55 * c for c in color),  # light enough for the dark ground of names
                horizontal_alignment="left",
            )
        self._names = []
        return np.ascontiguousarray(self._visualizer.get_output().get_image())

    def things(
        self,
        boxes: npt.NDArray[np.floating] | None,
        masks: list[npt.NDArray[np.bool_]] | None,
        classes: list[int],
        metadata: Any,
        scores: Sequence[float | None] | None = None,
    ) -> None:
        """Boxes (N, 4) x0, y0, x1, y1 and masks N x (H, W), both in pixels of the original image."""
        if not classes:
            return
        resized = None if masks is None else [self._mask(mask) for mask in masks]
        if boxes is not None:
            boxes = np.asarray(boxes, np.float64).reshape(-1, 4)
            boxes = boxes * (np.array(self._shape[::-1] * 2) / np.array(self._original[::-1] * 2))
        # a light fill: the colour of a thing may be what names it
        colors = [class_color(c) for c in classes]
        alpha = 0.2 if boxes is not None else 0.4
        self._visualizer.overlay_instances(boxes=boxes, masks=resized, assigned_colors=colors, alpha=alpha)
        names = metadata.get("thing_classes") or ()
        height = 1.35 * self._font_size
        for i, (category, score) in enumerate(zip(classes, scores or [None] * len(classes), strict=True)):
            if boxes is not None:
                x0, y0, x1, y1 = boxes[i]
                places = [
                    (x0, y0 - height),
                    (x0, y1),
                    (x0, y0),
                    (x1, y0),
                    (x1, y1 - height),
                    (x0, (y0 + y1) / 2),
                ]
            else:
                places = self._centres(resized[i] if resized else None, _label(category, names, score))
            self._names.append((_label(category, names, score), colors[i], places))

    def panoptic(
        self, ids: npt.NDArray[Any], segments: Sequence[Mapping[str, Any]] | None, metadata: Any
    ) -> None:
        """Segment ids (H, W); stuff first, things above it."""
        if segments is None:
            divisor = metadata.label_divisor
            countable = set(metadata.thing_dataset_id_to_contiguous_id.values())
            labels = [label for label in np.unique(ids).tolist() if label >= 0]
            segments = [
                {"id": v, "category_id": v // divisor, "isthing": v // divisor in countable} for v in labels
            ]
        stuff = [(ids == s["id"], s["category_id"]) for s in segments if not s["isthing"]]
        self._regions(stuff, metadata.get("stuff_classes") or (), alpha=0.4)
        things = [s for s in segments if s["isthing"] and (ids == s["id"]).any()]
        masks = [ids == s["id"] for s in things]
        scores = [s.get("score") for s in things]
        self.things(None, masks, [s["category_id"] for s in things], metadata, scores)

    def labels(self, labels: npt.NDArray[Any], metadata: Any) -> None:
        """A class for each pixel (H, W); what is no class is left clear."""
        names = metadata.stuff_classes
        present, counts = np.unique(labels, return_counts=True)
        known = [int(c) for c in present[np.argsort(-counts)] if 0 <= c < len(names)]
        self._regions([(labels == c, c) for c in known], names, alpha=0.45)

    def _regions(
        self, regions: Iterable[tuple[npt.NDArray[Any], int]], names: Sequence[str], alpha: float
    ) -> None:
        for mask, category in regions:
            resized, color = self._mask(mask), class_color(category)
            if not resized.any():
                continue
            self._visualizer.draw_binary_mask(
                resized, color=color, edge_color=(1, 1, 1), alpha=alpha, area_threshold=30
            )
            if resized.mean() > 0.004:  # a name on what is large enough to carry it
                self._names.append((_label(category, names), color, self._centres(resized, names[category])))

    def _centres(self, mask: Picture | None, name: str) -> list[tuple[float, float]]:
        """Corners for a name in the middle of a mask's largest part, or a little above or below it."""
        if mask is None or not mask.any():
            return [(0, 0)]
        _, parts, stats, _ = cv2.connectedComponentsWithStats(mask)
        rows, columns = np.nonzero(parts == 1 + stats[1:, cv2.CC_STAT_AREA].argmax())
        x = float(np.median(columns)) - _font(self._font_size).getlength(name) / 2
        y, step = float(np.median(rows)), 1.4 * self._font_size
        return [(x, y + k * step) for k in (-0.5, 0.5, -1.5, 1.5, -2.5, 2.5)]

    def _inside(self, x: float, y: float, width: float, height: float) -> tuple[float, float]:
        return max(0, min(x, self._shape[1] - width)), max(0, min(y, self._shape[0] - height))

    def _mask(self, mask: npt.NDArray[Any]) -> Picture:
        """A mask (H, W) at the canvas's size, its outline smooth."""
        resized = _resize(np.asarray(mask, np.float32), self._shape, cv2.INTER_LINEAR)
        return (resized > 0.5).astype(np.uint8)


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> float:
    """Common area of two boxes x0, y0, x1, y1."""
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def _label(category: int, names: Sequence[str], score: float | None = None) -> str:
    name = names[category] if category < len(names) else str(category)
    return name if score is None else f"{name} {100 * score:.0f}%"


def _kind(output: Mapping[str, Any]) -> str:
    """What of a model's output is drawn."""
    for kind in ("panoptic_seg", "instances", "sem_seg"):
        if kind in output or f"{kind}_labels" in output:
            return kind
    raise ValueError(f"nothing to draw in an output of {', '.join(sorted(output)) or 'nothing'}")


def _describe(output: Mapping[str, Any], threshold: float) -> str:
    if _kind(output) != "instances":
        return "prediction"
    shown = int((output["instances"].scores >= threshold).sum())
    return f"prediction  {shown} with score \u2265 {threshold:g}"


# ---- layout
# --------------------------------------------------------------------------------------------------------


def _image(record: Mapping[str, Any]) -> Picture:
    if isinstance(record.get("image"), np.ndarray):
        return np.asarray(record["image"])
    return read_image(record["file_name"])


def _array(values: Any) -> npt.NDArray[Any]:
    return values.detach().cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)


def _size(image: Picture, cell: int) -> tuple[int, int]:
    """(height, width) with the longer side at `cell` pixels."""
    height, width = image.shape[:2]
    scale = cell / max(height, width)
    return max(1, round(height * scale)), max(1, round(width * scale))


def _resize(array: npt.NDArray[Any], size: tuple[int, int], interpolation: int) -> npt.NDArray[Any]:
    if array.shape[0] > size[0] and interpolation == cv2.INTER_CUBIC:
        interpolation = cv2.INTER_AREA  # smaller without aliasing
    return np.asarray(cv2.resize(array, size[::-1], interpolation=interpolation))


def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(
        os.path.join(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), size
    )


def _titled(picture: Picture, title: str) -> Picture:
    """The picture with a line of text above it."""
    strip = Image.new("RGB", (picture.shape[1], _TITLE), _PAPER)
    ImageDraw.Draw(strip).text((2, 4), title, fill=_INK, font=_font(15))
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
    os.makedirs(os.path.dirname(os.fspath(path)) or ".", exist_ok=True)
    part = f"{os.fspath(path)}.part"
    if os.fspath(path).lower().endswith(".jpg"):
        Image.fromarray(picture).save(part, format="JPEG", quality=90)
    else:
        Image.fromarray(picture).save(part, format="PNG", optimize=True)
    os.replace(part, path)
