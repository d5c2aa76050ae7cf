"""Regions of an image for training (Wu et al., CLIPSelf, ICLR 2024, Sec. 3; values of the released code)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from random import Random

import numpy as np
import numpy.typing as npt
import torch

from clipdense.data.letterbox import Box, enlarge_box

__all__ = [
    "MAX_AREA",
    "MIN_AREA",
    "Regions",
    "add_jittered",
    "draw_patches",
    "draw_proposals",
    "grid_boxes",
    "grid_pairs",
    "patch_regions",
    "proposal_regions",
]

MIN_AREA, MAX_AREA = 8.0**2, 1024.0**2
"""Range of a proposal's area in square pixels of the original image; others are not used."""

Float32 = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Regions:
    """Regions of one image, xyxy in pixels of the original.

    Attributes:
        boxes: (n, 4), boxes that the student's dense map is pooled over; 0 in invalid rows.
        crops: (n, 4), boxes of the teacher's crops.
        valid: (n,) bool, rows that are used.
    """

    boxes: npt.NDArray[np.float64]
    crops: npt.NDArray[np.float64]
    valid: npt.NDArray[np.bool_]


@cache
def grid_pairs(max_split: int = 6) -> tuple[tuple[int, int], ...]:
    """List the grids as (rows, columns): up to ``max_split`` a side, neither side more than twice the other.

    There are 24 grids for 6.
    """
    return tuple(
        (rows, columns)
        for rows in range(1, max_split + 1)
        for columns in range((rows + 1) // 2, min(2 * rows, max_split) + 1)
    )


def grid_boxes(rows: int, columns: int) -> Float32:
    """Compute the cells (rows * columns, 4) of a grid over an image of size 1 x 1: xyxy, row-major."""
    # torch's linspace in float32, as published: cells that end on half a pixel are then rounded the same way
    x, y = torch.linspace(0, 1, columns + 1).numpy(), torch.linspace(0, 1, rows + 1).numpy()
    i, j = np.divmod(np.arange(rows * columns), columns)
    return np.stack([x[j], y[i], x[j + 1], y[i + 1]], axis=1)


def draw_patches(
    image_size: tuple[int, int],
    rng: Random,
    *,
    max_split: int = 6,
    max_boxes: int = 20,
    crop_scale: float = 1.0,
) -> Regions:
    """Draw a random grid and up to ``max_boxes`` of its cells; see `patch_regions`."""
    rows, columns = rng.choice(grid_pairs(max_split))
    cells = rng.sample(range(rows * columns), min(max_boxes, rows * columns))
    return patch_regions(image_size, (rows, columns), cells, crop_scale)


def patch_regions(
    image_size: tuple[int, int], grid: tuple[int, int], cells: Sequence[int], crop_scale: float = 1.0
) -> Regions:
    """Compute regions from cells of a grid over the image.

    Args:
        image_size: (H, W).
        grid: (rows, columns).
        cells: row-major indices.
        crop_scale: factor by which a cell is enlarged around its centre, and clipped to the image, for its
            crop.
    """
    height, width = image_size
    boxes = grid_boxes(*grid)[list(cells)] * np.array([width, height] * 2, np.float32)
    return _regions(boxes.astype(float), np.ones(len(boxes), bool), image_size, crop_scale)


def draw_proposals(
    boxes: npt.ArrayLike,
    image_size: tuple[int, int],
    rng: Random,
    *,
    max_boxes: int = 20,
    crop_scale: float = 1.5,
) -> Regions:
    """Draw up to ``max_boxes`` of an image's boxes (n, 4), xywh; see `proposal_regions`."""
    xywh = np.asarray(boxes, float).reshape(-1, 4)
    return proposal_regions(
        xywh[rng.sample(range(len(xywh)), min(max_boxes, len(xywh)))], image_size, crop_scale
    )


def proposal_regions(
    boxes: npt.NDArray[np.float64], image_size: tuple[int, int], crop_scale: float = 1.5
) -> Regions:
    """Compute regions from boxes; those smaller than `MIN_AREA` or larger than `MAX_AREA` are invalid.

    If no box is valid, the first row becomes the top-left corner of the image, a quarter of each side; its
    crop is rounded down to whole pixels and not enlarged, as published.

    Args:
        boxes: (n, 4) xywh in pixels.
        image_size: (H, W).
        crop_scale: factor by which a box is enlarged around its centre, and clipped to the image, for its
            crop.
    """
    area = boxes[:, 2] * boxes[:, 3]
    valid = (area >= MIN_AREA) & (area <= MAX_AREA)
    xyxy = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)
    regions = _regions(xyxy * valid[:, None], valid, image_size, crop_scale)
    if valid.any():
        return regions
    height, width = image_size
    corner, crop = np.zeros((max(1, len(boxes)), 4)), np.zeros((max(1, len(boxes)), 4))
    corner[0, 2:], crop[0, 2:] = (width / 4, height / 4), (width // 4, height // 4)
    return Regions(corner, crop, np.arange(len(corner)) == 0)


def add_jittered(
    regions: Regions, image_size: tuple[int, int], rng: Random, *, copies: int, crop_scale: float = 1.0
) -> Regions:
    """Add jittered copies of the valid regions. Not in the paper.

    The centre moves by up to a quarter of the box's width and height; both are multiplied by one factor,
    log-uniform between 3/4 and 4/3. Copies are clipped to the image.

    Args:
        regions: regions of an image.
        image_size: (H, W).
        rng: source of the random numbers.
        copies: number of copies of each region.
        crop_scale: factor by which a copy is enlarged around its centre, and clipped to the image, for its
            crop.

    Returns:
        The regions, followed by the copies, all of them valid.
    """
    height, width = image_size
    rows = []
    for x0, y0, x1, y1 in regions.boxes[regions.valid].repeat(copies, axis=0).tolist():
        factor = math.exp(rng.uniform(-1, 1) * math.log(4 / 3)) / 2
        x = (x0 + x1) / 2 + rng.uniform(-0.25, 0.25) * (x1 - x0)
        y = (y0 + y1) / 2 + rng.uniform(-0.25, 0.25) * (y1 - y0)
        dx, dy = factor * (x1 - x0), factor * (y1 - y0)
        rows.append((max(x - dx, 0), max(y - dy, 0), min(x + dx, width), min(y + dy, height)))
    boxes = np.array(rows, float).reshape(-1, 4)
    added = _regions(boxes, np.ones(len(boxes), bool), image_size, crop_scale)
    return Regions(
        np.concatenate([regions.boxes, added.boxes]),
        np.concatenate([regions.crops, added.crops]),
        np.concatenate([regions.valid, added.valid]),
    )


def _regions(
    boxes: npt.NDArray[np.float64], valid: npt.NDArray[np.bool_], image_size: tuple[int, int], scale: float
) -> Regions:
    crops: list[Box] = [enlarge_box(tuple(box), scale, image_size) for box in boxes.tolist()]
    return Regions(boxes, np.array(crops, float).reshape(-1, 4), valid)
