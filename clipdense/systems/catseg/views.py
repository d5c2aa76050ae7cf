"""Square views of an image, and the merging of their class scores (CAT-Seg, Cho et al., CVPR 2024)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from clipdense.inference import cut_windows, fold_windows

__all__ = ["WindowSettings", "merge_view", "merge_windows", "resize", "square_view", "window_views"]


@dataclass(frozen=True)
class WindowSettings:
    """Windows and a global view of an image.

    Attributes:
        enabled: False: the only view is the whole image.
        image_size: side in pixels of the square that the image is resized to before windows are cut.
        size: side in pixels of the windows and of the global view.
        stride: distance of neighbouring windows in pixels.

    Raises:
        ValueError: If the stride exceeds the window, or the window the image.
    """

    enabled: bool = False
    image_size: int = 640
    size: int = 384
    stride: int = 256

    def __post_init__(self) -> None:
        if not 0 < self.stride <= self.size <= self.image_size:
            raise ValueError(
                f"windows need 0 < STRIDE <= SIZE <= IMAGE_SIZE, not {self.stride}, {self.size} and "
                f"{self.image_size} (MODEL.CAT_SEG.TEST.WINDOWS)"
            )


def resize(maps: Tensor, size: int | tuple[int, int]) -> Tensor:
    """Resize maps (N, C, H, W) bilinearly; an integer is the side of a square."""
    size = (size, size) if isinstance(size, int) else size
    if maps.shape[-2:] == size:
        return maps
    return F.interpolate(maps, size, mode="bilinear", align_corners=False)


def square_view(image: Tensor, side: int, padding_multiple: int = 0) -> Tensor:
    """Resize a normalised image (C, H, W) to a square (C, side, side), without its aspect ratio.

    Args:
        image: the image.
        side: in pixels.
        padding_multiple: pad the image with zeros, right and below, to multiples of this before resizing, as
            published CAT-Seg does; the padding then stays a part of the view. 0: no padding.
    """
    if padding_multiple:
        height, width = image.shape[-2:]
        image = F.pad(image, (0, -width % padding_multiple, 0, -height % padding_multiple))
    return resize(image[None], side)[0]


def window_views(image: Tensor, settings: WindowSettings) -> Tensor:
    """Cut the windows of an image (C, H, W), then append the global view: (n + 1, C, size, size)."""
    windows = cut_windows(resize(image[None], settings.image_size), settings.size, settings.stride)[0]
    return torch.cat([windows, resize(image[None], settings.size)])


def merge_view(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize the scores of a whole image from logits (K, h, w) to (K, *size)."""
    return resize(logits[None].sigmoid(), size)[0]


def merge_windows(logits: Tensor, settings: WindowSettings, size: tuple[int, int]) -> Tensor:
    """Average the folded scores of windows with those of the global view.

    Args:
        logits: (n + 1, K, h, w), in the order of `window_views`.
        settings: those of the views.
        size: height and width of the result.

    Returns:
        Scores (K, *size) in 0..1.
    """
    scores = resize(logits, settings.size).sigmoid()
    square = (settings.image_size, settings.image_size)
    folded = fold_windows(scores[:-1], square, settings.size, settings.stride)
    whole = resize(scores[-1:], settings.image_size)[0]
    return resize(((folded + whole) / 2)[None], size)[0]
