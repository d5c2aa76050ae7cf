"""Sliding windows over large images: a function of crops becomes a function of whole images."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "centred_padding",
    "cut_windows",
    "fold_windows",
    "map_windows",
    "merge_windows",
    "pad_windows",
    "slide_windows",
    "window_starts",
]

DenseFunction = Callable[[Tensor], Tensor]
"""From images (n, C, h, w) to maps (n, K, h', w')."""


def window_starts(length: int, window: int, stride: int) -> list[int]:
    """Place windows along one side; the last one is shifted back so that it ends at the edge.

    Args:
        length: Side of the image in pixels.
        window: Side of a window; a window larger than the image is as large as the image.
        stride: Distance of neighbouring windows in pixels, at least 1.

    Returns:
        First pixel of each window, ascending.
    """
    last = max(length - window, 0)
    return [*range(0, last, stride), last]


def cut_windows(images: Tensor, window: int, stride: int) -> Tensor:
    """Cut images (B, C, H, W) into overlapping windows (B, n, C, h, w), row by row.

    Args:
        images: all of one size.
        window: Side of the windows in pixels; see `window_starts` for their places.
        stride: Distance of neighbouring windows in pixels.
    """
    size, starts = _windows_of((images.shape[-2], images.shape[-1]), window, stride)
    return torch.stack([images[..., y : y + size[0], x : x + size[1]] for y, x in starts], dim=1)


def fold_windows(maps: Tensor, size: tuple[int, int], window: int, stride: int) -> Tensor:
    """Average the maps of the windows that `cut_windows` cuts from one image, where windows overlap.

    Args:
        maps: (n, K, h, w), one value per pixel of the window.
        size: Height and width of the image.
        window: Side of the windows in pixels.
        stride: Distance of neighbouring windows in pixels.

    Returns:
        (K, H, W).
    """
    (height, width), starts = _windows_of(size, window, stride)
    total = maps.new_zeros(maps.shape[1], *size)
    count = maps.new_zeros(size)
    for (y, x), found in zip(starts, maps, strict=True):
        total[:, y : y + height, x : x + width] += found
        count[y : y + height, x : x + width] += 1
    return total.div_(count)


def _windows_of(
    image: tuple[int, int], window: int, stride: int
) -> tuple[tuple[int, int], list[tuple[int, int]]]:
    """Return the size of the windows of an image, and the first pixel of each."""
    size, (down, across) = _window_and_stride(image, window, stride, 1)
    tops, lefts = window_starts(image[0], size[0], down), window_starts(image[1], size[1], across)
    return size, list(product(tops, lefts))


def centred_padding(size: tuple[int, int], multiple: int) -> tuple[int, int, int, int]:
    """Return the padding (left, right, top, bottom) that makes both sides multiples of a number.

    The smaller half of an odd padding is left or top.
    """
    down, across = -size[0] % multiple, -size[1] % multiple
    return across // 2, across - across // 2, down // 2, down - down // 2


def pad_windows(function: DenseFunction, crops: Tensor, multiple: int) -> Tensor:
    """Apply a function to windows that are padded with zeros around, and cut the padding off its maps.

    Args:
        function: From windows to maps.
        crops: (n, C, h, w).
        multiple: The padded sides are multiples of it; 0 or 1 pads nothing.

    Returns:
        (n, K, h, w), resized bilinearly to the padded window and cut; the function's maps if nothing is
        padded.

    Source: ClearCLIP and ProxyCLIP (Lan et al., ECCV 2024), released code.
    """
    height, width = crops.shape[-2:]
    padding = centred_padding((height, width), multiple) if multiple > 1 else (0, 0, 0, 0)
    if not any(padding):
        return function(crops)
    padded = F.pad(crops, padding)
    maps = F.interpolate(function(padded), padded.shape[-2:], mode="bilinear", align_corners=False)
    left, _, top, _ = padding
    return maps[..., top : top + height, left : left + width]


@torch.no_grad()
def slide_windows(
    function: DenseFunction,
    images: Tensor,
    window: int | tuple[int, int],
    stride: int | tuple[int, int],
    *,
    cell: int | None = None,
    batch_size: int = 16,
    memory_limit: int = 2**32,
) -> Tensor:
    """Apply a function to overlapping windows and average its maps where windows overlap.

    This is the slide inference of mmsegmentation (scores are resized to the window and folded in pixels) and,
    with `cell`, the folding of feature maps (CAT-Seg, Cho et al., CVPR 2024).

    Args:
        function: From windows (n, C, h, w) to score or feature maps (n, K, h', w').
        images: (B, C, H, W).
        window: Height and width of a window in pixels.
        stride: Vertical and horizontal distance of neighbouring windows in pixels.
        cell: None resizes each map to its window bilinearly and folds pixels. Otherwise the maps are folded
            as they are, one value per `cell` x `cell` pixels; all sides must be multiples of it.
        batch_size: Windows per call of the function, of any images.
        memory_limit: Bytes above which the result is accumulated in the memory of the CPU, 4 GiB by default.

    Returns:
        (B, K, H, W), or (B, K, H / cell, W / cell), float32 or float64.

    Raises:
        ValueError: If the stride exceeds the window, so that pixels would be skipped, if a side is not a
            multiple of `cell`, or if the maps do not have the size that `cell` implies.
    """
    height, width = images.shape[-2:]
    size, (down, across) = _window_and_stride((height, width), window, stride, cell or 1)
    tops, lefts = window_starts(height, size[0], down), window_starts(width, size[1], across)
    starts = list(product(range(len(images)), tops, lefts))
    step = cell or 1
    total = count = torch.empty(0)
    for i in range(0, len(starts), batch_size):
        part = starts[i : i + batch_size]
        crops = torch.stack([images[b, :, y : y + size[0], x : x + size[1]] for b, y, x in part])
        maps = _at_cells(function(crops), size, cell)
        if not i:
            shape = (len(images), maps.shape[1], height // step, width // step)
            large = maps[0, 0, 0, 0].element_size() * torch.Size(shape).numel() > memory_limit
            total = maps.new_zeros(shape, device="cpu" if large else maps.device)
            count = total.new_zeros(shape[2:])
        for (b, y, x), found in zip(part, maps.to(total.device), strict=True):
            rows = slice(y // step, (y + size[0]) // step)
            columns = slice(x // step, (x + size[1]) // step)
            total[b, :, rows, columns] += found
            if b == 0:
                count[rows, columns] += 1
    return total.div_(count)


@torch.no_grad()
def map_windows(
    function: DenseFunction,
    images: Tensor,
    window: int,
    stride: int,
    *,
    multiple: int = 0,
    batch_size: int = 16,
) -> Tensor:
    """Apply a function to the windows of one image and keep its maps as they are.

    Args:
        function: From windows (n, C, h, w) to maps (n, K, h', w').
        images: (1, C, H, W).
        window: Side of a window in pixels; 0: the whole image is the only window.
        stride: Distance of neighbouring windows in pixels.
        multiple: Windows are padded to multiples of it with zeros around; 0 pads nothing.
        batch_size: Windows per call of the function.

    Returns:
        (n, K, h', w') for all windows, rows outer; `merge_windows` puts them together.
    """
    size, starts = _windows((images.shape[2], images.shape[3]), window, stride)
    padding = centred_padding(size, multiple) if multiple > 1 else (0, 0, 0, 0)
    maps = []
    for i in range(0, len(starts), batch_size):
        part = starts[i : i + batch_size]
        crops = torch.cat([images[..., y : y + size[0], x : x + size[1]] for y, x in part])
        maps.append(function(F.pad(crops, padding)))
    return torch.cat(maps)


def merge_windows(
    maps: Tensor, size: tuple[int, int], window: int, stride: int, *, multiple: int = 0
) -> Tensor:
    """Put the maps of `map_windows` together: each is resized to its window, and overlaps are averaged.

    Args:
        maps: (n, K, h, w), of all or some of the channels.
        size: Height and width of the image.
        window: See `map_windows`.
        stride: See `map_windows`.
        multiple: See `map_windows`; the padding is cut off.

    Returns:
        (K, H, W).
    """
    remaining = iter(maps)

    def take(crops: Tensor) -> Tensor:
        return torch.stack([next(remaining) for _ in crops])

    return slide_windows(
        lambda crops: pad_windows(take, crops, multiple),
        maps.new_zeros(1, 1, *size),
        window or max(size),
        stride if window else max(size),
        batch_size=1,
    )[0]


def _windows(
    image: tuple[int, int], window: int, stride: int
) -> tuple[tuple[int, int], list[tuple[int, int]]]:
    """Return the size of the windows, and their first pixels, rows outer."""
    if not window:
        return image, [(0, 0)]
    return _windows_of(image, window, stride)


def _window_and_stride(
    image: tuple[int, int], window: int | tuple[int, int], stride: int | tuple[int, int], cell: int
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Limit the window to the image, and check that windows leave no gap and consist of whole cells."""
    height, width = (window, window) if isinstance(window, int) else window
    down, across = (stride, stride) if isinstance(stride, int) else stride
    if not (0 < down <= height and 0 < across <= width):
        raise ValueError(
            f"stride {(down, across)} must be at least 1 and at most the window {(height, width)}"
        )
    size = min(height, image[0]), min(width, image[1])
    if any(side % cell for side in (*image, *size, down, across)):
        raise ValueError(
            f"image {image}, window {size} and stride {(down, across)} must be multiples of the cell of "
            f"{cell} pixels"
        )
    return size, (down, across)


def _at_cells(maps: Tensor, size: tuple[int, int], cell: int | None) -> Tensor:
    """Bring the maps of windows to float, and to one value per pixel or per cell."""
    maps = maps if maps.dtype == torch.float64 else maps.float()
    if cell is None:
        same = maps.shape[-2:] == size
        return maps if same else F.interpolate(maps, size, mode="bilinear", align_corners=False)
    expected = (size[0] // cell, size[1] // cell)
    if maps.shape[-2:] != expected:
        raise ValueError(
            f"windows of {size} pixels gave maps of {tuple(maps.shape[-2:])}; cells of {cell} pixels need "
            f"{expected}"
        )
    return maps
