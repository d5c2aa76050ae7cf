"""Checks of one annotation's box and mask, before any C code sees them.

pycocotools trusts its input: polygon coordinates far outside the image end in a segmentation fault or in no
end at all, and run lengths that do not cover the image leave uninitialised memory in the mask.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

__all__ = ["box_fault", "box_place", "has_mask", "mask_fault", "rle_fault", "rle_length"]

_MAX_PIXELS = 2**28
"""Masks of more pixels are refused: 16,384 x 16,384."""
_MARGIN = 10
"""Polygon points may lie this many image sides outside the image."""


def box_fault(box: Any) -> str | None:
    """Describe what is wrong with a box (x, y, width, height in pixels), or return None."""
    if not isinstance(box, list | tuple) or len(box) != 4:
        return f"bbox is {_shown(box)}, not four numbers x, y, width, height"
    if not all(_is_number(value) for value in box):
        return f"bbox {_shown(box)} holds something that is not a number"
    if not all(math.isfinite(value) and abs(value) < 1e9 for value in box):
        return f"bbox {_shown(box)} holds NaN, infinity or a number above 1e9"
    return None


def box_place(box: Sequence[float], height: int, width: int) -> str | None:
    """Describe a usable box that does not lie in its image, or return None.

    A box that exceeds its image by half a pixel is rounded, not misplaced.

    Args:
        box: x, y, width, height in pixels, for which `box_fault` is None.
        height, width: of its image, in pixels.
    """
    x, y, w, h = box
    if w <= 0 or h <= 0:
        return "without area"
    if x >= width or y >= height or x + w <= 0 or y + h <= 0:
        return "outside their image"
    if min(x, y) < -0.5 or x + w > width + 0.5 or y + h > height + 0.5:
        return "that exceed their image"
    return None


def has_mask(segmentation: Any) -> bool:
    """Return whether there is a mask: a missing field, null, [] and [[]] say that there is none."""
    if isinstance(segmentation, list):
        return any(polygon != [] for polygon in segmentation)
    return bool(segmentation)


def mask_fault(segmentation: Any, height: int, width: int) -> str | None:
    """Describe what is wrong with polygons or a run-length encoding, or None.

    Args:
        segmentation: the field of a COCO annotation, for which `has_mask` is true.
        height, width: of its image, in pixels.
    """
    if isinstance(segmentation, dict):
        return rle_fault(segmentation, height, width)
    if not isinstance(segmentation, list):
        return f"segmentation is {_shown(segmentation)}, neither polygons nor a run-length encoding"
    if all(_is_number(value) for value in segmentation):
        return "segmentation is one flat list of numbers, not a list of polygons ([[x0, y0, x1, y1, ...]])"
    limit = _MARGIN * max(height, width)
    for polygon in segmentation:
        if not isinstance(polygon, list | tuple) or not all(_is_number(value) for value in polygon):
            return f"a polygon is {_shown(polygon)}, not a list of numbers"
        if polygon and (len(polygon) < 6 or len(polygon) % 2):
            return f"a polygon has {len(polygon)} numbers; it needs an even number of at least 6"
        if not all(math.isfinite(value) and abs(value) <= limit for value in polygon):
            return f"a polygon has a point that is NaN, infinite or more than {_MARGIN} image sides outside"
    return None


def rle_fault(rle: dict[str, Any], height: int | None = None, width: int | None = None) -> str | None:
    """Describe what is wrong with a run-length encoding, or None.

    Args:
        rle: ``{"size": [h, w], "counts": list of run lengths, or COCO's compressed text}``.
        height, width: that its size must equal; None for any.
    """
    size, counts = rle.get("size"), rle.get("counts")
    if not isinstance(size, list | tuple) or len(size) != 2 or not all(_is_count(side) for side in size):
        return f"the size of a run-length encoding is {_shown(size)}, not [height, width]"
    if (height, width) != (None, None) and tuple(size) != (height, width):
        return f"a run-length encoding of {size[0]} x {size[1]} in an image of {height} x {width}"
    pixels = size[0] * size[1]
    if pixels > _MAX_PIXELS:
        return f"a run-length encoding of {size[0]} x {size[1]} is larger than 16384 x 16384"
    if not isinstance(counts, list | str | bytes):
        return f"the counts of a run-length encoding are {_shown(counts)}, neither a list nor text"
    try:
        length = rle_length(counts)
    except ValueError as error:
        return str(error)
    if length != pixels:
        return f"the counts of a run-length encoding add up to {length}, not to {size[0]} x {size[1]}"
    return None


def rle_length(counts: Sequence[int] | str | bytes) -> int:
    """Return the number of pixels that run lengths cover.

    Args:
        counts: run lengths, or COCO's compressed text: groups of 5 bits, lowest first, with a continuation
            bit; from the fourth run on, the difference to the run two before.

    Raises:
        ValueError: If a run is negative or not a whole number, or the text is not such an encoding.
    """
    if isinstance(counts, list | tuple):
        if not all(_is_count(run, least=0) for run in counts):
            raise ValueError("a run-length encoding has a run that is negative or not a whole number")
        return sum(counts)
    raw = counts.encode("ascii", "replace") if isinstance(counts, str) else bytes(counts)
    digits = np.frombuffer(raw, np.uint8).astype(np.int64) - 48
    if not len(digits):
        return 0
    if digits.min() < 0 or digits.max() > 63 or digits[-1] & 32:
        raise ValueError("the text of a run-length encoding is cut short or holds a wrong character")
    last = (digits & 32) == 0
    start = np.concatenate([[0], np.flatnonzero(last)[:-1] + 1])
    place = np.arange(len(digits)) - np.repeat(start, np.diff([*start, len(digits)]))
    if place.max() > 6:
        raise ValueError("the text of a run-length encoding holds a run above 2^32")
    values = np.add.reduceat((digits & 31) << 5 * place, start)
    ends = digits[last]
    values -= np.where(ends & 16, np.int64(1) << 5 * (place[last] + 1), 0)
    runs = values.copy()
    runs[1::2] = np.cumsum(values[1::2])
    # the first run stands alone: differences begin at the fourth, of runs two apart
    runs[2::2] = np.cumsum(values[2::2])
    if (runs < 0).any():
        raise ValueError("a run-length encoding has a negative run")
    return int(runs.sum())


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_count(value: Any, least: int = 1) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value < 2**31


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
