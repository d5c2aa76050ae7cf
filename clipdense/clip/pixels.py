"""Pixel normalisation: the one place where images become a CLIP's input."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from open_clip.transform import image_transform
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import resize, to_tensor

__all__ = ["normalize_pixels", "preprocess"]


def normalize_pixels(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Normalise RGB images per channel.

    Args:
        images: (..., 3, H, W) RGB, 0..255, uint8 or float.
        mean: per channel, of images in 0..1 (`ClipModel.pixel_mean`).
        std: per channel, of images in 0..1 (`ClipModel.pixel_std`).

    Returns:
        (..., 3, H, W) on the same device; float32 for integer images, otherwise the dtype of the images.
    """
    dtype = images.dtype if images.is_floating_point() else torch.float32
    center, scale = (
        255 * torch.tensor(s, dtype=dtype, device=images.device).view(3, 1, 1) for s in (mean, std)
    )
    return (images - center) / scale


def preprocess(
    image: Image.Image,
    image_size: tuple[int, int],
    settings: Mapping[str, Any],
    *,
    crop: bool = True,
    size: int | None = None,
) -> Tensor:
    """Convert a PIL image of any mode to the input of a CLIP, as open_clip's ``preprocess`` does.

    Args:
        image: the image.
        image_size: native (H, W) of the model in pixels.
        settings: open_clip's `preprocess_cfg`: mean, std, interpolation, resize_mode.
        crop: resize to the native size and cut out the centre, as for `ClipModel.encode_image`. False keeps
            the whole image, as for features per pixel; its shorter side is resized.
        size: shorter side in pixels, without ``crop``; default: that of the native size.

    Returns:
        (3, H, W) float32 on the CPU.
    """
    mode = settings.get("interpolation", "bicubic")
    mean, std = tuple(settings["mean"]), tuple(settings["std"])
    if crop:
        transform: Any = image_transform(
            image_size,
            is_train=False,
            mean=mean,
            std=std,
            resize_mode=settings.get("resize_mode", "shortest"),
            interpolation=mode,
        )
        cropped: Tensor = transform(image)
        return cropped
    pixels = to_tensor(resize(image.convert("RGB"), size or min(image_size), InterpolationMode(mode)))
    return normalize_pixels(255 * pixels, mean, std)
