"""Segmentation by the cosines of patches with class names, in sliding windows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from clipdense.inference.windows import map_windows, merge_windows
from clipdense.inference.zero_shot import class_probabilities, text_cosines

__all__ = ["PatchWindows", "segment_by_patches"]

CHUNK = 64
"""Names whose full-size maps are held at a time, for large vocabularies."""


@dataclass(frozen=True)
class PatchWindows:
    """Sliding windows of a patch encoder.

    Attributes:
        window: side in pixels; 0: the whole image is the only window.
        stride: distance of neighbouring windows in pixels; 0: they do not overlap.
        batch_size: windows per forward.
        multiple: windows are padded with zeros to multiples of it, the stride of the patches.
    """

    window: int = 0
    stride: int = 0
    batch_size: int = 16
    multiple: int = 0

    def maps(self, encode: Callable[[Tensor], Tensor], image: Tensor) -> Tensor:
        """Encode the windows of a normalised image (1, 3, H, W) as maps (n, D, h, w)."""
        return map_windows(
            encode,
            image,
            self.window,
            self.stride or self.window,
            multiple=self.multiple,
            batch_size=self.batch_size,
        )

    def merge(self, maps: Tensor, size: tuple[int, int]) -> Tensor:
        """Put the maps (n, K, h, w) of all windows of an image of this size together, (K, H, W)."""
        return merge_windows(maps, size, self.window, self.stride or self.window, multiple=self.multiple)


def segment_by_patches(
    maps: Tensor,
    windows: PatchWindows,
    image_size: tuple[int, int],
    size: tuple[int, int],
    text: Tensor,
    classes: Tensor,
    num_classes: int,
    *,
    scale: float,
    max_dense_classes: int = 0,
) -> dict[str, Tensor]:
    """Compare the patches of an image with class names, and resize the cosines to the output.

    Args:
        maps: (n, D, h, w) of the windows, see `PatchWindows.maps`.
        windows: how the image was cut.
        image_size: height and width of the image.
        size: height and width of the result.
        text: (S, D) embeddings of all names, L2-normalised.
        classes: (S,) int64, the class of each name.
        num_classes: K.
        scale: factor of the cosines in the softmax over the names.
        max_dense_classes: number of classes above which the result has labels only; 0: no limit.

    Returns:
        ``sem_seg`` (K, *size), see `class_probabilities`, or ``sem_seg_labels`` (*size) int64.
    """

    def cosines(rows: Tensor) -> Tensor:
        merged = windows.merge(text_cosines(maps, rows), image_size)
        return F.interpolate(merged[None], size, mode="bilinear", align_corners=False)[0]

    if not 0 < max_dense_classes < num_classes:
        return {"sem_seg": class_probabilities(cosines(text), classes, num_classes, scale)}
    best, labels = cosines(text[:CHUNK]).max(0)
    for start in range(CHUNK, len(text), CHUNK):
        top, index = cosines(text[start : start + CHUNK]).max(0)
        labels = torch.where(top > best, index + start, labels)
        best = torch.maximum(top, best)
    return {"sem_seg_labels": classes[labels]}
