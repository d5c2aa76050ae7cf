"""Procedural scenes with exact ground truth: the `shapes` world.

A scene depends only on ``(seed, index)``, and every machine draws the same scene. To this end, pixels are
computed only by operations that IEEE 754 rounds exactly (+ - * / sqrt, comparisons), angles come from a
rounded table, and random numbers are raw 53-bit uniforms.

Things are coloured shapes (8 colours x 10 shapes = 80 classes). Stuff is one of 8 textured grounds. Two
shapes in all colours and four combinations of a known colour and a known shape are *novel*: captions name
them, base-class detection labels do not.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from clipdense.data.shapes.draw import (
    COLOR_HUES,
    GROUND_PAINTERS,
    SHAPE_FIELDS,
    Rng,
    hsv_to_rgb,
    value_noise,
    wave,
)

Array = npt.NDArray[np.float32]

SHAPES: tuple[str, ...] = tuple(SHAPE_FIELDS)
COLORS: tuple[str, ...] = tuple(COLOR_HUES)
GROUNDS: tuple[str, ...] = tuple(GROUND_PAINTERS)
CLASSES: tuple[str, ...] = tuple(f"{color} {shape}" for color in COLORS for shape in SHAPES)
"""The 80 thing classes; class ``i`` is colour ``i // 10``, shape ``i % 10``."""

NOVEL_SHAPES: tuple[str, ...] = ("heart", "arrow")
NOVEL_COMBINATIONS: tuple[str, ...] = ("red star", "yellow ring", "green square", "blue moon")
NOVEL: frozenset[int] = frozenset(
    i for i, name in enumerate(CLASSES) if name.split()[1] in NOVEL_SHAPES or name in NOVEL_COMBINATIONS
)
BASE: tuple[int, ...] = tuple(i for i in range(len(CLASSES)) if i not in NOVEL)

MIN_DIAMETER, MAX_DIAMETER = 20.0, 120.0
MIN_VISIBLE_PIXELS = 24
"""Minimum number of visible pixels. A thing with fewer is neither drawn nor annotated."""


@dataclass(frozen=True)
class Thing:
    """One object of a scene.

    Attributes:
        category: class id, 0..79.
        mask: (H, W) bool, the visible part.
        visible: visible pixels divided by the pixels of the whole shape (with occluded and cut-off parts),
            0..1.
    """

    category: int
    mask: npt.NDArray[np.bool_]
    visible: float

    @property
    def color(self) -> int:
        """Index into `COLORS`."""
        return self.category // len(SHAPES)

    @property
    def shape(self) -> int:
        """Index into `SHAPES`."""
        return self.category % len(SHAPES)

    @cached_property
    def box(self) -> tuple[int, int, int, int]:
        """Tight box (x0, y0, x1, y1) of the visible part in pixels, x1 and y1 exclusive."""
        ys, xs = np.flatnonzero(self.mask.any(1)), np.flatnonzero(self.mask.any(0))
        return int(xs[0]), int(ys[0]), int(xs[-1]) + 1, int(ys[-1]) + 1


@dataclass(frozen=True)
class Scene:
    """A drawn scene.

    Attributes:
        image: (H, W, 3) uint8 RGB.
        ground: (H, W) uint8, index into `GROUNDS` of the ground at each pixel, also below things.
        things: objects, bottom to top.
    """

    image: npt.NDArray[np.uint8]
    ground: npt.NDArray[np.uint8]
    things: list[Thing]


def render(
    seed: int,
    index: int,
    *,
    size: int = 256,
    shift: bool = False,
    class_weights: Sequence[float] | None = None,
) -> Scene:
    """Draw scene ``index`` of world ``seed``.

    Args:
        seed: seed of the world; each split has its own.
        index: scene number, >= 0.
        size: side of the square scene in pixels. Objects keep their size in pixels.
        shift: draw the same classes from a shifted distribution, with a wider range of light, ground colours
            and thing sizes.
        class_weights: relative frequency of each of the 80 classes (default: equal).

    Returns:
        The scene, with at most 8 things. Things may be cut off by the border or partly covered.
    """
    rng = Rng(seed, index)
    ground, canvas = _draw_grounds(rng, size, shift)
    light = rng.direction()
    for _ in range(rng.integer(1, 3)):
        _draw_clutter(rng, canvas)

    cumulative = np.cumsum(
        np.ones(len(CLASSES)) if class_weights is None else np.asarray(class_weights, np.float64)
    )
    things: list[_Placed] = []
    for _ in range(rng.integer(2, 8)):
        category = min(int(np.searchsorted(cumulative, rng.uniform(0.0, float(cumulative[-1])), "right")), 79)
        _place_thing(rng, canvas, things, category, light, shift)
    for _ in range(rng.integer(0, 2)):
        _draw_clutter(rng, canvas)

    spread = 0.14 if shift else 0.05
    cast = np.array([rng.uniform(1 - spread, 1 + spread) for _ in range(3)], np.float32)
    exposure = np.float32(rng.uniform(0.6, 1.25) if shift else rng.uniform(0.85, 1.1))
    pixels = np.clip(canvas * (cast * exposure), 0, 1) * np.float32(255) + np.float32(0.5)
    seen = [Thing(t.category, t.mask, float(np.count_nonzero(t.mask)) / t.full_pixels) for t in things]
    return Scene(pixels.astype(np.uint8), ground, seen)


@dataclass
class _Placed:
    category: int
    mask: npt.NDArray[np.bool_]
    full_pixels: int


def _draw_grounds(rng: Rng, size: int, shift: bool) -> tuple[npt.NDArray[np.uint8], Array]:
    """Draw one to three regions with curved borders, each with a different ground."""
    kinds = rng.permutation(len(GROUNDS))[: rng.integer(1, 3)]
    ground = np.full((size, size), kinds[0], np.uint8)
    y, x = _grid(size)
    for kind in kinds[1:]:
        dx, dy = rng.direction()
        along, across = (x * dx + y * dy) / size, (y * dx - x * dy) / size
        bend = rng.uniform(0.03, 0.12) * wave(across * rng.uniform(0.6, 1.8) + rng.uniform(0, 1))
        centre = 0.5 * (dx + dy)
        ground[along + bend > centre + rng.uniform(-0.22, 0.22)] = kind
    canvas = np.empty((size, size, 3), np.float32)
    for kind in kinds:
        where = ground == kind
        if where.any():
            tint = (
                np.array([rng.uniform(-0.1, 0.1) for _ in range(3)], np.float32) if shift else np.float32(0)
            )
            paint = list(GROUND_PAINTERS.values())[kind](rng, x, y) + tint
            canvas[where] = paint[where]
    canvas *= (1 + np.float32(rng.uniform(0.04, 0.14)) * (value_noise(rng, size, size, 80.0) - 0.5))[
        ..., None
    ]
    return ground, canvas


def _draw_clutter(rng: Rng, canvas: Array) -> None:
    """Draw a thin arc in a dull colour: an edge that belongs to no thing."""
    size = canvas.shape[0]
    y, x = _grid(size)
    cx, cy = rng.uniform(-0.5, 1.5) * size, rng.uniform(-0.5, 1.5) * size
    radius = rng.uniform(0.3, 1.2) * size
    distance = np.abs(np.sqrt((x - cx) * (x - cx) + (y - cy) * (y - cy)) - np.float32(radius))
    alpha = np.clip(np.float32(rng.uniform(0.8, 1.6)) - distance, 0, 1) * np.float32(rng.uniform(0.4, 0.9))
    grey = rng.uniform(0.1, 0.9)
    color = np.array([grey + rng.uniform(-0.08, 0.08) for _ in range(3)], np.float32)
    canvas += alpha[..., None] * (color - canvas)


def _place_thing(
    rng: Rng, canvas: Array, things: list[_Placed], category: int, light: tuple[float, float], shift: bool
) -> None:
    """Draw a thing where every other thing stays sufficiently visible; give up after eight tries."""
    size = canvas.shape[0]
    diameter = (_SHIFTED_DIAMETERS if shift else _DIAMETERS)[rng.integer(0, 255)]
    field = _thing_field(rng, SHAPES[category % len(SHAPES)], diameter)
    patch = field.shape[0]
    alpha = np.clip(np.float32(0.5) - field, 0, 1)
    solid = alpha > 0.5
    full_pixels = int(np.count_nonzero(solid))
    color = _thing_paint(rng, COLORS[category // len(SHAPES)], field, diameter, light)
    shadow = np.clip(np.float32(0.5) - field / np.float32(max(2.0, diameter * 0.08)), 0, 1) * np.float32(0.4)

    for _ in range(8):
        left = int(rng.uniform(0.06, 0.94) * size) - patch // 2
        top = int(rng.uniform(0.06, 0.94) * size) - patch // 2
        mask = np.zeros((size, size), bool)
        where, part = _overlap(top, left, patch, size)
        mask[where] = solid[part]
        if np.count_nonzero(mask) < max(MIN_VISIBLE_PIXELS, 0.4 * full_pixels):
            continue
        left_over = [np.count_nonzero(t.mask & ~mask) for t in things]
        if all(
            n >= max(MIN_VISIBLE_PIXELS, 0.35 * t.full_pixels) for n, t in zip(left_over, things, strict=True)
        ):
            break
    else:
        return
    step = max(1, int(diameter * 0.06))
    lit, lit_part = _overlap(top - int(light[1] * step), left - int(light[0] * step), patch, size)
    canvas[lit] *= 1 - shadow[lit_part][..., None]
    canvas[where] += alpha[part][..., None] * (color[part] - canvas[where])
    for thing in things:
        thing.mask &= ~mask
    things.append(_Placed(category, mask, full_pixels))


def _thing_field(rng: Rng, shape: str, diameter: float) -> Array:
    """Compute signed distances (pixels, negative inside) to a rotated, stretched shape on a square patch."""
    sdf, max_turn = SHAPE_FIELDS[shape]
    half = int(diameter * 0.68) + 8
    y, x = _grid(2 * half + 1)
    radius = diameter / 2
    x, y = (x - half) / np.float32(radius), (y - half) / np.float32(radius)
    cos, sin = rng.rotation(max_turn)
    x, y = x * cos + y * sin, y * cos - x * sin
    stretch = rng.uniform(0.88, 1.14)
    return sdf(x * np.float32(stretch), y / np.float32(stretch)) * np.float32(radius)


def _thing_paint(rng: Rng, color: str, field: Array, diameter: float, light: tuple[float, float]) -> Array:
    """Paint a thing (P, P, 3) with a slightly random hue, shading, a bevel and one of four textures."""
    hue = COLOR_HUES[color] + (rng.uniform(-3, 3) + rng.uniform(-3, 3)) * 0.75
    rgb = np.array(hsv_to_rgb(hue, rng.uniform(0.72, 0.95), rng.uniform(0.78, 0.98)), np.float32)
    patch = field.shape[0]
    y, x = _grid(patch)
    slope = (x * light[0] + y * light[1]) / np.float32(patch) - np.float32(0.5 * (light[0] + light[1]))
    shade = 1 + np.float32(rng.uniform(0.1, 0.35)) * slope
    shade *= np.float32(0.82) + np.float32(0.18) * np.clip(-field / np.float32(0.1 * diameter), 0, 1)
    strength = np.float32(rng.uniform(0.08, 0.22))
    kind = rng.integer(0, 3)
    dx, dy = rng.direction()
    period = np.float32(rng.uniform(5, 12))
    if kind == 1:
        shade *= 1 - strength * wave((x * dx + y * dy) / period)
    elif kind == 2:
        shade *= 1 - strength * wave((x * dx + y * dy) / period) * wave((y * dx - x * dy) / period)
    elif kind == 3:
        shade *= 1 - strength * value_noise(rng, patch, patch, 4.0)
    return np.clip(rgb * shade[..., None], 0, 1)


def _overlap(top: int, left: int, patch: int, size: int) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
    """Return the slices of a canvas and of a patch placed at (top, left), both square, where they overlap."""
    y0, y1, x0, x1 = max(top, 0), min(top + patch, size), max(left, 0), min(left + patch, size)
    y1, x1 = max(y0, y1), max(x0, x1)
    return (slice(y0, y1), slice(x0, x1)), (slice(y0 - top, y1 - top), slice(x0 - left, x1 - left))


def _grid(size: int) -> tuple[Array, Array]:
    """Return row coordinates (size, 1) and column coordinates (1, size)."""
    line = np.arange(size, dtype=np.float32)
    return line[:, None], line[None, :]


def _log_uniform(low: float, high: float) -> list[float]:
    """Compute 256 log-uniform steps from low to high, rounded so that exp() gives equal values everywhere."""
    return [round(low * math.exp(math.log(high / low) * (i + 0.5) / 256), 4) for i in range(256)]


_DIAMETERS = _log_uniform(MIN_DIAMETER, MAX_DIAMETER)
_SHIFTED_DIAMETERS = _log_uniform(0.8 * MIN_DIAMETER, 1.25 * MAX_DIAMETER)
