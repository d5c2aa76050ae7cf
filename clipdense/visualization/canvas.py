"""Drawing of boxes, masks and names on an image, with OpenCV and Pillow.

Detectron2's `Visualizer` draws through matplotlib, which takes tens of times longer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from clipdense.visualization.curves import class_color
from clipdense.visualization.fonts import drawable_name, load_font
from clipdense.visualization.segments import panoptic_segments

__all__ = ["Canvas", "Color", "Picture", "fitted", "resize"]

Picture = npt.NDArray[np.uint8]
Color = tuple[float, float, float]

_MIN_OUTLINE = 30
"""Smallest area that gets an outline, in pixels of the drawing."""


def fitted(image: Picture, cell: int) -> tuple[int, int]:
    """Return the size (height, width) of an image resized to a longer side of ``cell`` pixels."""
    height, width = image.shape[:2]
    scale = cell / max(height, width)
    return max(1, round(height * scale)), max(1, round(width * scale))


def resize(array: npt.NDArray[Any], size: tuple[int, int], interpolation: int) -> npt.NDArray[Any]:
    """Resize an array (h, w) or (h, w, C) to a size (height, width)."""
    if array.shape[0] > size[0] and interpolation == cv2.INTER_CUBIC:
        interpolation = cv2.INTER_AREA  # no aliasing
    return np.asarray(cv2.resize(array, size[::-1], interpolation=interpolation))


class Canvas:
    """Resized image on which boxes, masks and names are drawn.

    Names are placed last, where they overlap other names least.

    Args:
        image: (H, W, 3) uint8 RGB.
        cell: longer side of the drawing, in pixels.

    Raises:
        ValueError: If the image has another shape or type.
    """

    def __init__(self, image: Picture, cell: int) -> None:
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
            raise ValueError(
                f"expected an image (H, W, 3) of type uint8, got {image.shape} of type {image.dtype}"
            )
        self._original = image.shape[:2]
        self._shape = fitted(image, cell)
        self._page = resize(image, self._shape, cv2.INTER_CUBIC).copy()
        self._line = max(1, round(cell / 256))
        self._font_size = max(11, round(cell / 38))
        self._names: list[tuple[str, Color, list[tuple[float, float]]]] = []

    def picture(self) -> Picture:
        """Return the drawing, (H', W', 3) uint8 RGB."""
        page = Image.fromarray(self._page)
        ink = ImageDraw.Draw(page, "RGBA")
        for (name, color, _), box in zip(self._names, self._place_names(), strict=True):
            light = tuple(round(255 * (0.45 + 0.55 * c)) for c in color)  # on a dark background
            ink.rectangle(box, fill=(0, 0, 0, 204))
            font = load_font(self._font_size, name)
            ink.text((box[0] + 2, (box[1] + box[3]) / 2), name, fill=light, font=font, anchor="lm")
        self._names = []
        return np.asarray(page)

    def _place_names(self) -> list[tuple[float, float, float, float]]:
        """Place each name where it overlaps those before least: boxes x0, y0, x1, y1."""
        occupied: list[tuple[float, float, float, float]] = []
        for name, _, places in self._names:
            font = load_font(self._font_size, name)
            width, height = font.getlength(name) + 4, 1.35 * self._font_size
            corners = [self._inside(x, y, width, height) for x, y in places]
            boxes = [(x, y, x + width, y + height) for x, y in corners]
            occupied.append(min(boxes, key=lambda box: sum(_overlap(box, other) for other in occupied)))
        return occupied

    def things(
        self,
        boxes: npt.NDArray[np.floating] | None,
        masks: list[npt.NDArray[np.bool_]] | None,
        classes: list[int],
        metadata: Any,
        scores: Sequence[float | None] | None = None,
    ) -> None:
        """Draw instances.

        Args:
            boxes: (N, 4) x0, y0, x1, y1 in pixels of the original image; None draws no boxes.
            masks: N masks (H, W); None draws no masks.
            classes: N class indices.
            metadata: class names.
            scores: N scores in 0..1, or None for those without.
        """
        if not classes:
            return
        resized = None if masks is None else [self._mask(mask) for mask in masks]
        if boxes is not None:
            boxes = np.asarray(boxes, np.float64).reshape(-1, 4)
            boxes = boxes * (np.array(self._shape[::-1] * 2) / np.array(self._original[::-1] * 2))
        # a light fill, since the class may depend on the colour of the object
        colors = [class_color(c) for c in classes]
        alpha = 0.2 if boxes is not None else 0.4
        sizes = boxes[:, 2:] - boxes[:, :2] if boxes is not None else None
        areas = [mask.sum() for mask in resized or ()] if sizes is None else sizes.prod(1)
        for i in np.argsort(-np.asarray(areas, np.float64), kind="stable").tolist():  # small ones on top
            if resized is not None:
                self._fill(resized[i], colors[i], colors[i], alpha)
            if boxes is not None:
                self._box(boxes[i], colors[i])
        names = metadata.get("thing_classes") or metadata.get("stuff_classes") or ()
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
        """Draw the segments of an id map (H, W), stuff below things."""
        segments = panoptic_segments(ids, segments, metadata)
        stuff = [(ids == s["id"], s["category_id"]) for s in segments if not s["isthing"]]
        self._regions(stuff, metadata.get("stuff_classes") or (), alpha=0.4)
        things = [s for s in segments if s["isthing"] and (ids == s["id"]).any()]
        masks = [ids == s["id"] for s in things]
        scores = [s.get("score") for s in things]
        self.things(None, masks, [s["category_id"] for s in things], metadata, scores)

    def labels(self, labels: npt.NDArray[Any], metadata: Any) -> None:
        """Draw a map of classes (H, W); pixels without a valid class stay clear."""
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
            self._fill(resized, color, (1, 1, 1), alpha)
            if resized.mean() > 0.004:  # large enough for a name
                name = _label(category, names)
                self._names.append((name, color, self._centres(resized, name)))

    def _fill(self, mask: Picture, color: Color, edge: Color, alpha: float) -> None:
        """Blend a colour into the pixels of a mask, and draw its outline."""
        x, y, width, height = cv2.boundingRect(mask)
        inside, part = mask[y : y + height, x : x + width] > 0, self._page[y : y + height, x : x + width]
        part[inside] = ((1 - alpha) * part[inside] + alpha * 255 * np.array(color)).round().astype(np.uint8)
        outlines, _ = cv2.findContours(mask, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
        large = [outline for outline in outlines if cv2.contourArea(outline) >= _MIN_OUTLINE]
        cv2.polylines(self._page, large, True, [255 * c for c in edge], 1, cv2.LINE_AA)

    def _box(self, box: npt.NDArray[np.floating], color: Color) -> None:
        """Draw a box x0, y0, x1, y1, half transparent."""
        x0, y0, x1, y1 = (round(float(value)) for value in box)
        drawn = self._page.copy()
        cv2.rectangle(drawn, (x0, y0), (x1, y1), [255 * c for c in color], self._line)
        cv2.addWeighted(drawn, 0.7, self._page, 0.3, 0, dst=self._page)

    def _centres(self, mask: Picture | None, name: str) -> list[tuple[float, float]]:
        """Return corners for a name in, above and below the middle of a mask's largest component."""
        if mask is None or not mask.any():
            return [(0, 0)]
        _, parts, stats, _ = cv2.connectedComponentsWithStats(mask)
        rows, columns = np.nonzero(parts == 1 + stats[1:, cv2.CC_STAT_AREA].argmax())
        x = float(np.median(columns)) - load_font(self._font_size, name).getlength(name) / 2
        y, step = float(np.median(rows)), 1.4 * self._font_size
        return [(x, y + k * step) for k in (-0.5, 0.5, -1.5, 1.5, -2.5, 2.5)]

    def _inside(self, x: float, y: float, width: float, height: float) -> tuple[float, float]:
        return max(0, min(x, self._shape[1] - width)), max(0, min(y, self._shape[0] - height))

    def _mask(self, mask: npt.NDArray[Any]) -> Picture:
        """Resize a mask (H, W) to the canvas, with a smooth outline."""
        resized = resize(np.asarray(mask, np.float32), self._shape, cv2.INTER_LINEAR)
        return (resized > 0.5).astype(np.uint8)


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> float:
    """Return the intersection area of two boxes x0, y0, x1, y1."""
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def _label(category: int, names: Sequence[str], score: float | None = None) -> str:
    name = drawable_name(names[category], category) if category < len(names) else str(category)
    return name if score is None else f"{name} {100 * score:.0f}%"
