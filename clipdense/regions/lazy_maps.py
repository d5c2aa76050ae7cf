"""Maps that are resized and computed a few rows at a time, so that large images need little memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["LazyMaps", "slices"]

WHOLE = 2**29
"""Bytes up to which maps are computed at once. Larger maps are computed in bands."""
BAND = 2**26
"""Bytes of the largest intermediate result of one band."""

Size = tuple[int, int]


@dataclass(frozen=True)
class _Step:
    """One operation of a `LazyMaps`.

    Attributes:
        kind: "resize", "crop" or "apply".
        channels: Number of maps after the step.
        size: Height and width after the step.
        function: The function of "apply".
    """

    kind: str
    channels: int
    size: Size
    function: Callable[[Tensor], Tensor] | None = None


@dataclass(frozen=True)
class LazyMaps:
    """Maps (C, H, W) that are computed from smaller maps on request, whole or in bands of rows.

    Each method that adds an operation returns new maps and computes nothing. A band differs from the same
    rows of the whole maps by rounding only: rows are interpolated in another order than `F.interpolate` does.

    Attributes:
        source: (C, h, w).
        steps: The operations from the source to the maps, in order.
    """

    source: Tensor
    steps: tuple[_Step, ...] = ()

    @classmethod
    def of(cls, maps: Tensor | LazyMaps) -> LazyMaps:
        """Wrap maps (C, H, W); lazy maps are returned unchanged."""
        return maps if isinstance(maps, LazyMaps) else cls(maps)

    @property
    def shape(self) -> tuple[int, int, int]:
        """C, H and W."""
        return self._shape(len(self.steps))

    @property
    def device(self) -> torch.device:
        """The device of the maps."""
        return self.source.device

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Tensor | slice) -> LazyMaps:
        """Select maps by a mask (C,) bool, indices or a slice.

        Raises:
            ValueError: If an operation has changed the number of maps.
        """
        if any(step.channels != len(self.source) for step in self.steps):
            raise ValueError("maps can only be selected before their number changes")
        source = self.source[index]
        return LazyMaps(source, tuple(replace(step, channels=len(source)) for step in self.steps))

    def resize(self, size: Size) -> LazyMaps:
        """Resize the maps to a height and width, bilinearly with ``align_corners=False``."""
        if tuple(size) == self.shape[1:]:
            return self
        return self._then(_Step("resize", len(self), (int(size[0]), int(size[1]))))

    def crop(self, size: Size) -> LazyMaps:
        """Keep the top-left part of a height and width."""
        if tuple(size) == self.shape[1:]:
            return self
        return self._then(_Step("crop", len(self), (int(size[0]), int(size[1]))))

    def apply(self, function: Callable[[Tensor], Tensor], channels: int | None = None) -> LazyMaps:
        """Apply a function of each pixel.

        Args:
            function: From maps (C, n, W), which it does not change, to maps (C', n, W) of the same pixels.
            channels: C'; default: C.
        """
        return self._then(
            _Step("apply", len(self) if channels is None else channels, self.shape[1:], function)
        )

    def rows(self, start: int, stop: int) -> Tensor:
        """Compute the rows from `start` to `stop`, exclusive: (C, stop - start, W)."""
        return self._rows(len(self.steps), start, stop)

    def bands(self, whole: int | None = None, band: int | None = None) -> Iterator[slice]:
        """Split the rows into bands.

        Args:
            whole: Bytes of the largest intermediate result up to which there is a single band; default: 512
                MiB.
            band: Bytes of the largest intermediate result of each band otherwise, of which a band has at
                least one row; default: 64 MiB.
        """
        height = self.shape[1]
        bytes_of_step = [self._bytes(level) for level in range(len(self.steps) + 1)]
        whole, band = WHOLE if whole is None else whole, BAND if band is None else band
        if max(bytes_of_step) <= whole:
            yield slice(0, height)
            return
        yield from slices(height, max(1, band * height // max(bytes_of_step)))

    def compute(self) -> Tensor:
        """Compute the maps (C, H, W), in bands if they are large."""
        first, *others = self.bands()
        rows = self.rows(first.start, first.stop)
        if not others:
            return rows
        maps = rows.new_empty(self.shape)
        maps[:, first] = rows
        for band in others:
            maps[:, band] = self.rows(band.start, band.stop)
        return maps

    def cached(self) -> LazyMaps:
        """Compute the maps now if they are small (512 MiB), so that several uses share the work."""
        if not self.steps or next(self.bands()).stop < self.shape[1]:
            return self
        return LazyMaps(self.compute())

    def parts(self, whole: int | None = None, part: int | None = None) -> Iterator[slice]:
        """Split the maps into groups that can be computed whole; arguments as for `bands`, of the largest
        intermediate result."""
        count = len(self)
        size = max(self._bytes(level) for level in range(len(self.steps) + 1))
        if size <= (WHOLE if whole is None else whole):
            yield slice(0, count)
            return
        yield from slices(count, max(1, (BAND if part is None else part) * count // size))

    def _then(self, step: _Step) -> LazyMaps:
        return replace(self, steps=(*self.steps, step))

    def _shape(self, level: int) -> tuple[int, int, int]:
        if level == 0:
            channels, height, width = self.source.shape
            return channels, height, width
        step = self.steps[level - 1]
        return step.channels, *step.size

    def _bytes(self, level: int) -> int:
        channels, height, width = self._shape(level)
        return channels * height * width * max(4, self.source.element_size())

    def _rows(self, level: int, start: int, stop: int) -> Tensor:
        if level == 0:
            return self.source[:, start:stop]
        step, (_, height, width) = self.steps[level - 1], self._shape(level - 1)
        if step.function is not None:
            return step.function(self._rows(level - 1, start, stop))
        if step.kind == "crop":
            if (start, stop) == (0, step.size[0]):  # the padding as well, to interpolate whole maps
                return self._rows(level - 1, 0, height)[:, : step.size[0], : step.size[1]]
            return self._rows(level - 1, start, stop)[:, :, : step.size[1]]
        if (start, stop) == (0, step.size[0]):
            return _interpolate(self._rows(level - 1, 0, height), step.size)
        upper, lower, weight = _row_taps(height, step.size[0], start, stop, self.device)
        first, last = int(upper[0]), int(lower[-1])
        rows = self._rows(level - 1, first, last + 1)
        if width != step.size[1]:
            rows = _interpolate(rows, (last + 1 - first, step.size[1]))
        weight = weight[:, None].to(rows.dtype)
        result = rows[:, upper - first].mul_(1 - weight)
        return result.add_(rows[:, lower - first].mul_(weight))


def slices(count: int, step: int) -> Iterator[slice]:
    """Split 0 .. count into slices of at most `step`; at least one slice, which may be empty."""
    for start in range(0, max(count, 1), step):
        yield slice(start, min(start + step, count))


def _interpolate(maps: Tensor, size: Size) -> Tensor:
    if not len(maps):
        return maps.new_zeros(0, *size)
    return F.interpolate(maps[None], size, mode="bilinear", align_corners=False)[0]


def _row_taps(
    height: int, out_height: int, start: int, stop: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Find the two source rows of each row of a resized map, and the weight of the lower one.

    The arithmetic is float32, as that of `F.interpolate`.
    """
    scale = torch.tensor(height, dtype=torch.float32, device=device) / out_height
    position = (torch.arange(start, stop, dtype=torch.float32, device=device) + 0.5) * scale - 0.5
    position = position.clamp(min=0)
    upper = position.long().clamp(max=height - 1)
    return upper, (upper + 1).clamp(max=height - 1), position - upper
