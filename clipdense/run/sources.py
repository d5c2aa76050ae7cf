"""Sources of `Predictor.predict`: one image, many images, or a video."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
import numpy.typing as npt
import torch

from clipdense.data.image import ImageSource, load_image
from clipdense.run.inputs import VIDEO_SUFFIXES, find_inputs

__all__ = ["Source", "expand_source", "is_video", "read_pixels"]

Source = ImageSource | torch.Tensor | Sequence[Any]
"""What `Predictor.predict` takes."""


def is_video(source: Any) -> TypeGuard[str | os.PathLike[str]]:
    """Return whether a source is the path of a video, by its ending."""
    return isinstance(source, str | os.PathLike) and Path(source).suffix.lower() in VIDEO_SUFFIXES


def expand_source(source: Any) -> Any:
    """Return a list of images for a source of many (list, folder, glob, batch tensor), or the one image.

    Raises:
        FileNotFoundError: If a folder has no images, or a glob no matches.
        ValueError: If a tensor is neither (3, H, W) nor (B, 3, H, W).
    """
    if isinstance(source, torch.Tensor):
        if source.ndim not in (3, 4):
            raise ValueError(f"an image tensor must be (3, H, W) or (B, 3, H, W), not {tuple(source.shape)}")
        return source if source.ndim == 3 else list(source)
    if isinstance(source, str | os.PathLike):
        if not Path(source).expanduser().is_dir() and not (set(os.fspath(source)) & set("*?")):
            return source
        found = find_inputs([os.fspath(source)])
        if not found.images:
            raise FileNotFoundError(f"{source}: {next(iter(found.failed.values()), 'videos and no images')}")
        return list(found.images)
    return list(source) if isinstance(source, list | tuple) else source


def read_pixels(image: Any, max_pixels: int) -> tuple[npt.NDArray[np.uint8], str]:
    """Load one image as (H, W, 3) uint8 RGB, and return the name of its file; "" if it has none.

    Args:
        image: file, PIL image, array (see `array_to_image`), or tensor (3, H, W) with the values of such an
            array.
        max_pixels: larger files are refused.
    """
    if isinstance(image, torch.Tensor):
        return load_image(image.detach().cpu().permute(1, 2, 0).numpy()), ""
    name = os.fspath(image) if isinstance(image, str | os.PathLike) else getattr(image, "filename", "")
    return load_image(image, max_pixels=max_pixels), str(name or "")
