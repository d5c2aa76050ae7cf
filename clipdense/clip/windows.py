"""Dense maps computed in windows: tokens attend within windows of the size that the model was trained on."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from clipdense.clip.towers import Tower, TowerRequest

__all__ = ["dense_map", "tile_map"]


def dense_map(tower: Tower, images: Tensor, mode: str, window: int = 0) -> Tensor:
    """Compute the dense map of images, as a whole or in windows.

    A window is an image of its own to the tower: its tokens attend within it, and have the positions (and a
    class token) of an image of that size. With the native size, nothing is interpolated. Windows do not
    overlap; those that exceed the image are filled up with zeros.

    Args:
        tower: the image tower.
        images: (B, 3, H, W), normalised.
        mode: one of the tower's dense modes.
        window: side of the windows in pixels, a multiple of the stride; 0: the whole image.

    Returns:
        (B, D, h, w), not L2-normalised.

    Raises:
        ValueError: If the stride does not divide the window.
    """
    request = TowerRequest(dense=mode)

    def encode(x: Tensor) -> Tensor:
        dense: Tensor = tower(x, request).dense
        return dense

    return tile_map(encode, images, tower.stride, window)


def tile_map(encode: Callable[[Tensor], Tensor], images: Tensor, stride: int, window: int = 0) -> Tensor:
    """Encode images as a whole or in windows, as `dense_map` does.

    Args:
        encode: from normalised images (n, 3, H, W) to maps (n, D, H // stride, W // stride).
        images: (B, 3, H, W), normalised.
        stride: of the maps, in pixels.
        window: side of the windows in pixels, a multiple of the stride; 0: the whole image.

    Returns:
        (B, D, h, w).

    Raises:
        ValueError: If the stride does not divide the window.
    """
    height, width = images.shape[-2:]
    if not window:
        return encode(images)
    if window % stride:
        raise ValueError(f"a window of {window} pixels is not a multiple of the stride {stride}")
    batch, rows, columns = len(images), -(-height // window), -(-width // window)
    x = F.pad(images, (0, columns * window - width, 0, rows * window - height))
    x = x.reshape(batch, 3, rows, window, columns, window).permute(0, 2, 4, 1, 3, 5).flatten(0, 2)
    z = encode(x)  # (B * rows * columns, D, g, g)
    z = z.view(batch, rows, columns, *z.shape[1:]).permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)
    return z[..., : height // stride, : width // stride]
