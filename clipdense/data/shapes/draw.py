"""Drawing primitives of the `shapes` world: random numbers, noise, grounds and signed distance fields."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]
Field = Callable[[Array, Array], Array]

_TURN = [(round(math.cos(math.radians(a)), 6), round(math.sin(math.radians(a)), 6)) for a in range(360)]


class Rng:
    """Random numbers that depend only on (seed, index).

    All of them are computed from raw uniforms, because NumPy keeps that stream stable across versions.

    Args:
        seed: seed of the world, >= 0.
        index: number of the stream, >= 0.
    """

    def __init__(self, seed: int, index: int) -> None:
        self._generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, index])))

    def uniform(self, low: float, high: float) -> float:
        """Draw a float in [low, high)."""
        return low + (high - low) * float(self._generator.random())

    def integer(self, low: int, high: int) -> int:
        """Draw an integer in [low, high], both ends included."""
        return min(low + int(self._generator.random() * (high - low + 1)), high)

    def array(self, *shape: int) -> Array:
        """Draw a float32 array of the given shape, uniform in [0, 1)."""
        return self._generator.random(shape).astype(np.float32)

    def permutation(self, n: int) -> list[int]:
        """Draw a random order of the numbers 0..n-1."""
        return [int(i) for i in np.argsort(self._generator.random(n), kind="stable")]

    def rotation(self, max_turn: int) -> tuple[float, float]:
        """Draw a whole number of degrees in [-max_turn, max_turn] and return its (cos, sin)."""
        return _TURN[self.integer(-max_turn, max_turn) % 360]

    def direction(self) -> tuple[float, float]:
        """Draw a unit vector."""
        return self.rotation(180)


def wave(t: npt.NDArray[np.floating[Any]]) -> Array:
    """Evaluate a smooth function of period 1 with values in 0..1.

    It replaces the cosine, whose last bits differ between machines.
    """
    tent: Array = np.abs((t - np.floor(t)) * np.float32(2) - 1)
    smooth: Array = tent * tent * (3 - 2 * tent)
    return smooth


def value_noise(rng: Rng, height: int, width: int, cell_x: float, cell_y: float | None = None) -> Array:
    """Draw smooth noise.

    Args:
        rng: random numbers.
        height, width: size of the noise in pixels.
        cell_x, cell_y: distance of the random knots in pixels (default of ``cell_y``: ``cell_x``).

    Returns:
        (height, width) float32 in 0..1.
    """
    rows, wy = _lattice(height, cell_y or cell_x)
    columns, wx = _lattice(width, cell_x)
    knots = rng.array(int(rows[-1]) + 2, int(columns[-1]) + 2)
    lines = knots[rows] * (1 - wy[:, None]) + knots[rows + 1] * wy[:, None]
    noise = lines[:, columns] * (1 - wx) + lines[:, columns + 1] * wx
    return noise.astype(np.float32, copy=False)


def _lattice(size: int, cell: float) -> tuple[npt.NDArray[np.int64], Array]:
    t = np.arange(size, dtype=np.float32) / np.float32(cell)
    index = t.astype(np.int64)
    fraction = t - index.astype(np.float32)
    return index, fraction * fraction * (3 - 2 * fraction)


def hsv_to_rgb(hue: float, saturation: float, value: float) -> tuple[float, float, float]:
    """Convert hue in degrees (any value), saturation and value in 0..1 to RGB in 0..1."""
    sector = (hue / 60.0) % 6.0

    def channel(offset: float) -> float:
        k = (offset + sector) % 6.0
        return value - value * saturation * max(0.0, min(k, 4.0 - k, 1.0))

    return channel(5.0), channel(3.0), channel(1.0)


COLOR_HUES = {
    "red": 0.0,
    "orange": 28.0,
    "yellow": 55.0,
    "green": 122.0,
    "cyan": 182.0,
    "blue": 228.0,
    "purple": 276.0,
    "pink": 324.0,
}


# ---- ground textures: (rng, x (1, W), y (H, 1)) -> (H, W, 3) ----


def _shaded(tone: tuple[float, float, float], light: Array) -> Array:
    return np.array(tone, np.float32) * light[..., None]


def _turned(rng: Rng, x: Array, y: Array) -> tuple[Array, Array]:
    dx, dy = rng.direction()
    return x * dx + y * dy, y * dx - x * dy


def _noise(rng: Rng, x: Array, y: Array, cell_x: float, cell_y: float | None = None) -> Array:
    return value_noise(rng, y.shape[0], x.shape[1], cell_x, cell_y)


def _grass(rng: Rng, x: Array, y: Array) -> Array:
    return _shaded(
        (0.42, 0.52, 0.30), 0.55 + 0.6 * _noise(rng, x, y, 2.0, 9.0) + 0.15 * _noise(rng, x, y, 24.0)
    )


def _sand(rng: Rng, x: Array, y: Array) -> Array:
    return _shaded(
        (0.80, 0.71, 0.54), 0.86 + 0.16 * rng.array(y.shape[0], x.shape[1]) + 0.1 * _noise(rng, x, y, 40.0)
    )


def _water(rng: Rng, x: Array, y: Array) -> Array:
    ripple = wave(y / np.float32(rng.uniform(9, 14)) + 1.6 * _noise(rng, x, y, 30.0, 14.0))
    return _shaded((0.34, 0.47, 0.58), 0.75 + 0.4 * ripple * ripple)


def _brick(rng: Rng, x: Array, y: Array) -> Array:
    height, width = 11.0, 25.0
    row = np.floor(y / np.float32(height))
    u = x / np.float32(width) + 0.5 * (row - 2 * np.floor(row / 2))
    fx, fy = u - np.floor(u), y / np.float32(height) - row
    mortar = (fx < 0.07) | (fy < 0.15)
    tone = 0.75 + 0.4 * _noise(rng, x, y, 20.0, 10.0)
    paint = _shaded((0.56, 0.38, 0.33), tone)
    paint[mortar] = np.array((0.70, 0.68, 0.64), np.float32)
    return paint


def _wood(rng: Rng, x: Array, y: Array) -> Array:
    grain = wave(y / np.float32(rng.uniform(14, 22)) + 1.2 * _noise(rng, x, y, 90.0, 20.0))
    return _shaded((0.62, 0.48, 0.34), 0.72 + 0.3 * grain + 0.12 * _noise(rng, x, y, 30.0, 2.0))


def _gravel(rng: Rng, x: Array, y: Array) -> Array:
    stones = _noise(rng, x, y, 7.0)
    stones = np.clip((stones - 0.35) * 2.2, 0, 1)
    return _shaded((0.60, 0.58, 0.57), 0.45 + 0.55 * stones + 0.15 * rng.array(y.shape[0], x.shape[1]))


def _snow(rng: Rng, x: Array, y: Array) -> Array:
    return _shaded((0.92, 0.94, 0.97), 0.88 + 0.12 * _noise(rng, x, y, 36.0) + 0.03 * _noise(rng, x, y, 4.0))


def _tiles(rng: Rng, x: Array, y: Array) -> Array:
    u, v = _turned(rng, x, y)
    side = np.float32(rng.uniform(18, 28))
    u, v = u / side, v / side
    dark = (np.floor(u) + np.floor(v)) / 2
    light = 0.78 + 0.4 * (dark - np.floor(dark))
    light = np.where((u - np.floor(u) < 0.08) | (v - np.floor(v) < 0.08), np.float32(0.5), light)
    return _shaded((0.70, 0.72, 0.75), light.astype(np.float32))


GROUND_PAINTERS: dict[str, Callable[[Rng, Array, Array], Array]] = {
    "grass": _grass,
    "sand": _sand,
    "water": _water,
    "brick": _brick,
    "wood": _wood,
    "gravel": _gravel,
    "snow": _snow,
    "tiles": _tiles,
}


# ---- shapes: signed distance (negative inside) in units of the radius; y points down ----


def _circle(x: Array, y: Array) -> Array:
    return np.sqrt(x * x + y * y) - np.float32(0.9)


def _ring(x: Array, y: Array) -> Array:
    return np.abs(np.sqrt(x * x + y * y) - np.float32(0.72)) - np.float32(0.24)


def _moon(x: Array, y: Array) -> Array:
    hollow = x - np.float32(0.5)
    return np.maximum(
        np.sqrt(x * x + y * y) - np.float32(0.98), np.float32(0.74) - np.sqrt(hollow * hollow + y * y)
    )


def _polygon(points: list[tuple[float, float]], rounding: float = 0.04) -> Field:
    """Return the exact signed distance field of a closed polygon with corners rounded by ``rounding``."""

    def field(x: Array, y: Array) -> Array:
        shape = np.broadcast_shapes(x.shape, y.shape)
        nearest = np.full(shape, np.float32(1e9))
        inside = np.zeros(shape, bool)
        for (ax, ay), (bx, by) in zip(points, points[1:] + points[:1], strict=True):
            ex, ey = bx - ax, by - ay
            px, py = x - np.float32(ax), y - np.float32(ay)
            t = np.clip((px * ex + py * ey) / np.float32(ex * ex + ey * ey), 0, 1)
            qx, qy = px - t * ex, py - t * ey
            nearest = np.minimum(nearest, qx * qx + qy * qy)
            if ay != by:
                crossing = ((py < 0) != (y - np.float32(by) < 0)) & (px < py * np.float32(ex / ey))
                inside ^= crossing
        distance = np.sqrt(nearest)
        return np.where(inside, -distance, distance) - np.float32(rounding)

    return field


def _on_circle(degrees: float, radius: float) -> tuple[float, float]:
    angle = math.radians(degrees)
    return round(radius * math.sin(angle), 4), round(-radius * math.cos(angle), 4)


def _heart_points() -> list[tuple[float, float]]:
    curve = []
    for i in range(22):
        t = 2 * math.pi * (i + 0.5) / 22
        px = 16 * math.sin(t) ** 3
        py = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
        curve.append((round(px / 17.5, 4), round(-(py + 2.5) / 17.5, 4)))
    return curve


_STAR = [_on_circle(36 * i, 0.98 if i % 2 == 0 else 0.42) for i in range(10)]
_CROSS = [
    (-0.3, -0.92), (0.3, -0.92), (0.3, -0.3), (0.92, -0.3), (0.92, 0.3), (0.3, 0.3),
    (0.3, 0.92), (-0.3, 0.92), (-0.3, 0.3), (-0.92, 0.3), (-0.92, -0.3), (-0.3, -0.3),
]  # fmt: skip
_ARROW = [
    (0.96, 0.0),
    (0.16, -0.74),
    (0.16, -0.26),
    (-0.94, -0.26),
    (-0.94, 0.26),
    (0.16, 0.26),
    (0.16, 0.74),
]
_HOURGLASS = [(-0.72, -0.9), (0.72, -0.9), (0.12, 0.0), (0.72, 0.9), (-0.72, 0.9), (-0.12, 0.0)]

SHAPE_FIELDS: dict[str, tuple[Field, int]] = {
    "circle": (_circle, 180),
    "square": (_polygon([(-0.76, -0.76), (0.76, -0.76), (0.76, 0.76), (-0.76, 0.76)]), 180),
    "triangle": (_polygon([_on_circle(120 * i, 0.98) for i in range(3)]), 180),
    "star": (_polygon(_STAR, 0.03), 180),
    "heart": (_polygon(_heart_points(), 0.03), 40),
    "cross": (_polygon(_CROSS), 180),
    "ring": (_ring, 180),
    "moon": (_moon, 180),
    "arrow": (_polygon(_ARROW), 180),
    "hourglass": (_polygon(_HOURGLASS), 180),
}
"""Name -> (field, largest rotation in degrees that does not change the class)."""
