"""Image and map operations of an exported model's caller, on NumPy arrays alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = [
    "Floats",
    "merge_panoptic",
    "non_maximum_suppression",
    "pad_to_multiple",
    "resize_maps",
    "softmax",
    "test_size",
    "windowed",
]

Floats = npt.NDArray[np.float32]


def test_size(height: int, width: int, shortest: int, longest: int) -> tuple[int, int]:
    """Compute the size of an image whose shortest side is resized, as Detectron2's ResizeShortestEdge.

    Args:
        height, width: of the image in pixels.
        shortest: shortest side of the result; 0: the image keeps its size.
        longest: limit of the longest side; 0: none.
    """
    if not shortest:
        return height, width
    scale = shortest / min(height, width)
    new: tuple[float, float] = (scale * height, shortest)
    if height < width:
        new = shortest, scale * width
    if longest and max(new) > longest:
        scale = longest / max(new)
        new = new[0] * scale, new[1] * scale
    return int(new[0] + 0.5), int(new[1] + 0.5)


def pad_to_multiple(
    images: Floats, multiple: int, centred: bool = False
) -> tuple[Floats, tuple[slice, slice]]:
    """Pad images with zeros.

    Args:
        images: (..., H, W).
        multiple: the padded sides are multiples of it; 0 or 1: no padding.
        centred: pad on all sides; otherwise right and below.

    Returns:
        The padded images, and the rows and columns of the image in them.
    """
    height, width = images.shape[-2:]
    down, across = (-height % multiple, -width % multiple) if multiple > 1 else (0, 0)
    top, left = (down // 2, across // 2) if centred else (0, 0)
    place = slice(top, top + height), slice(left, left + width)
    if not (down or across):
        return images, place
    edges = [(0, 0)] * (images.ndim - 2) + [(top, down - top), (left, across - left)]
    return np.pad(images, edges), place


def resize_maps(maps: Floats, size: Sequence[int]) -> Floats:
    """Resize maps (..., h, w) bilinearly, pixel centres aligned as in torch (align_corners False)."""
    height, width = int(size[0]), int(size[1])
    if maps.shape[-2] != height:
        upper, lower, weight = _taps(maps.shape[-2], height)
        maps = maps[..., upper, :] * (1 - weight[:, None]) + maps[..., lower, :] * weight[:, None]
    if maps.shape[-1] != width:
        left, right, weight = _taps(maps.shape[-1], width)
        maps = maps[..., left] * (1 - weight) + maps[..., right] * weight
    return maps


def _taps(length: int, new: int) -> tuple[Any, Any, Floats]:
    """Return the two source positions of each new position, and the weight of the second."""
    scale = np.float32(length) / np.float32(new)
    position = (np.arange(new, dtype=np.float32) + np.float32(0.5)) * scale - np.float32(0.5)
    position = np.maximum(position, np.float32(0))
    first = np.minimum(position.astype(np.int64), length - 1)
    return first, np.minimum(first + 1, length - 1), (position - first).astype(np.float32)


def softmax(logits: Floats, axis: int) -> Floats:
    """Compute the softmax along an axis."""
    exponentials = np.exp(logits - logits.max(axis=axis, keepdims=True))
    result: Floats = exponentials / exponentials.sum(axis=axis, keepdims=True)
    return result


def windowed(function: Callable[[Floats], Floats], image: Floats, window: int, stride: int) -> Floats:
    """Average the maps of overlapping windows.

    Args:
        function: from a window (1, 3, h, w) to maps (1, S, h, w) of the same size.
        image: (1, 3, H, W).
        window: side in pixels; limited to the image. The last window ends at the edge.
        stride: distance of neighbouring windows in pixels.

    Returns:
        (1, S, H, W).
    """
    height, width = image.shape[-2:]
    size = min(window, height), min(window, width)
    tops, lefts = (
        [*range(0, side - own, stride), side - own] for side, own in zip((height, width), size, strict=True)
    )
    total: Any = None
    count = np.zeros((height, width), np.float32)
    for y in tops:
        for x in lefts:
            place = (..., slice(y, y + size[0]), slice(x, x + size[1]))
            maps = function(np.ascontiguousarray(image[place]))
            if total is None:
                total = np.zeros((*maps.shape[:2], height, width), np.float32)
            total[place] += maps
            count[place] += 1
    result: Floats = total / count
    return result


def merge_panoptic(
    scores: Floats,
    masks: Floats,
    things: Sequence[int],
    *,
    object_threshold: float,
    overlap_threshold: float,
    pixel_threshold: float,
) -> tuple[npt.NDArray[np.int32], list[dict[str, Any]]]:
    """Merge queries to segments without overlap, as `clipdense.inference.panoptic_inference`.

    Args:
        scores: (Q, K + 1) class probabilities, "no object" last.
        masks: (Q, H, W) mask probabilities.
        things: classes whose queries stay separate segments.
        object_threshold: class probability that a query must exceed.
        overlap_threshold: least ratio of the pixels that a query wins to those inside its mask.
        pixel_threshold: least mask probability of a pixel.

    Returns:
        Segment ids (H, W), 0 for none, and the segments with ``id``, ``category_id`` and ``isthing``.
    """
    top, labels = scores.max(1), scores.argmax(1)
    kept = (labels != scores.shape[1] - 1) & (top > object_threshold)
    masks, top, labels = masks[kept], top[kept], labels[kept]
    ids = np.zeros(masks.shape[1:], np.int32)
    if not len(labels):
        return ids, []
    winner = (top[:, None, None] * masks).argmax(0)
    confident = np.take_along_axis(masks, winner[None], 0)[0] >= pixel_threshold
    segments: list[dict[str, Any]] = []
    stuff: dict[int, int] = {}
    for query, label in enumerate(labels.tolist()):
        won, inside = winner == query, int((masks[query] >= 0.5).sum())
        owned = won & confident
        if not owned.any() or not inside or int(won.sum()) / inside < overlap_threshold:
            continue
        thing = label in things
        if thing or label not in stuff:
            segments.append({"id": len(segments) + 1, "category_id": label, "isthing": thing})
            if not thing:
                stuff[label] = len(segments)
        ids[owned] = len(segments) if thing else stuff[label]
    return ids, segments


def non_maximum_suppression(
    boxes: Floats, scores: Floats, *, threshold: float, overlap: float, limit: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Select the best (box, class) pairs, without worse boxes of the same class that overlap them.

    Args:
        boxes: (R, 4) xyxy, shared by all classes, or (R, K, 4).
        scores: (R, K).
        threshold: score that a pair must exceed.
        overlap: intersection over union above which the worse box is removed.
        limit: number of pairs at most.

    Returns:
        Index of the box and of the class, by descending score.
    """
    rows, columns = np.nonzero(scores > threshold)
    order = np.argsort(-scores[rows, columns], kind="stable")
    rows, columns = rows[order], columns[order]
    found = boxes[rows] if boxes.ndim == 2 else boxes[rows, columns]
    areas = (found[:, 2] - found[:, 0]) * (found[:, 3] - found[:, 1])
    alive = np.ones(len(rows), bool)
    kept: list[int] = []
    for i in range(len(rows)):
        if not alive[i]:
            continue
        kept.append(i)
        if len(kept) == limit:
            break
        low = np.maximum(found[i, :2], found[i + 1 :, :2])
        high = np.minimum(found[i, 2:], found[i + 1 :, 2:])
        common = np.prod(np.clip(high - low, 0, None), axis=1)
        union = areas[i] + areas[i + 1 :] - common
        alive[i + 1 :] &= ~((common > overlap * union) & (columns[i + 1 :] == columns[i]))
    return rows[kept], columns[kept]
