"""Pixel-adaptive mask refinement (PAMR): maps are averaged along the colours of the image."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["pamr", "pamr_weights", "refine_masks"]


def pamr(images: Tensor, masks: Tensor, *, steps: int = 10, dilations: Sequence[int] = (8, 16)) -> Tensor:
    """Refine maps by the colours of an image.

    Args:
        images: (B, C, H, W).
        masks: (B, K, h, w), resized to the image bilinearly with ``align_corners=True``.
        steps: number of averaging steps.
        dilations: distances of the eight neighbours in pixels.

    Returns:
        (B, K, H, W).

    Source: Araslanov and Roth, CVPR 2020, section 4.2; used by NACLIP, SCLIP, ResCLIP and Talk2DINO.
    """
    if masks.shape[-2:] != images.shape[-2:]:
        masks = F.interpolate(masks, images.shape[-2:], mode="bilinear", align_corners=True)
    return refine_masks(pamr_weights(images, dilations), masks, steps=steps, dilations=dilations)


def pamr_weights(images: Tensor, dilations: Sequence[int] = (8, 16)) -> Tensor:
    """Compute the weights of the neighbours, (B, 8 len(dilations), H, W), which sum to 1.

    Softmax over the neighbours of -|I - I_n| / (1e-8 + 0.1 sigma), its mean over the channels, with one
    unbiased standard deviation sigma over all neighbours and, once for each distance, the pixel itself.
    """
    count = 9 * len(dilations)
    total = len(dilations) * images
    for neighbour in _neighbours(images, dilations):
        total = total + neighbour
    mean = total / count
    squares = len(dilations) * (images - mean).square()
    for neighbour in _neighbours(images, dilations):
        squares = squares + (neighbour - mean).square()
    sigma = 1e-8 + 0.1 * (squares / (count - 1)).sqrt()
    logits = [-((images - n).abs() / sigma).mean(1) for n in _neighbours(images, dilations)]
    return torch.stack(logits, 1).softmax(1)


def refine_masks(
    weights: Tensor, masks: Tensor, *, steps: int = 10, dilations: Sequence[int] = (8, 16)
) -> Tensor:
    """Average maps (B, K, H, W) over their neighbours with the weights of `pamr_weights`, repeatedly."""
    for _ in range(steps):
        refined = torch.zeros_like(masks)
        for i, neighbour in enumerate(_neighbours(masks, dilations)):
            refined.addcmul_(neighbour, weights[:, i, None].to(masks))
        masks = refined
    return masks


def _neighbours(maps: Tensor, dilations: Sequence[int]) -> Iterator[Tensor]:
    """Yield the maps shifted by each distance in eight directions; the border is replicated."""
    height, width = maps.shape[-2:]
    for d in dilations:
        padded = F.pad(maps, (d, d, d, d), mode="replicate")
        for y in (0, d, 2 * d):
            for x in (0, d, 2 * d):
                if (y, x) != (d, d):
                    yield padded[..., y : y + height, x : x + width]
