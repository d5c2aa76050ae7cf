"""Training input of `SegCLIP`: images with a caption and superpixels."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from clipdense.data.caption_mapper import CaptionMapper
from clipdense.data.image import MAX_PIXELS, Orientation
from clipdense.data.mappers import MAPPER_REGISTRY, DetectionMapper
from clipdense.systems.segclip.loss import patch_segments

from detectron2.config import CfgNode, configurable

__all__ = ["SegCLIPMapper"]


@MAPPER_REGISTRY.register()
class SegCLIPMapper(CaptionMapper):
    """Mapper from a captioned image to a random crop, one of its captions, and the superpixel of each patch.

    In evaluation it is `DetectionMapper`.

    Args:
        is_train: whether crops are random.
        size: side of the crops in pixels.
        patch: side of a patch in pixels, which divides ``size``.
        crop_scale: range of the area of a crop, as a share of the image.
        superpixels: scale, sigma in pixels and smallest size in pixels of Felzenszwalb's superpixels.
        patch_label: how the superpixel of a patch is chosen, see `patch_segments`.
        test_mapper: mapper of evaluation.
        skip_bad_images: return None for a damaged image, with a warning, instead of raising an error (in
            training only).
        exif_orientation: "auto", "apply" or "ignore", see `clipdense.data.image.read_image`.
        max_pixels: largest image, in pixels.

    Raises:
        ValueError: If the patch does not divide the size.
    """

    @configurable
    def __init__(
        self,
        is_train: bool = True,
        *,
        size: int = 224,
        patch: int = 16,
        crop_scale: tuple[float, float] = (0.5, 1.0),
        superpixels: tuple[float, float, int] = (224.0, 0.9, 224),
        patch_label: str = "majority",
        test_mapper: DetectionMapper | None = None,
        skip_bad_images: bool = False,
        exif_orientation: Orientation = "auto",
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        if size % patch:
            raise ValueError(f"INPUT.SEGCLIP.SIZE {size} is not a multiple of INPUT.SEGCLIP.PATCH {patch}")
        super().__init__(
            is_train,
            size=size,
            crop_scale=crop_scale,
            test_mapper=test_mapper,
            skip_bad_images=skip_bad_images,
            exif_orientation=exif_orientation,
            max_pixels=max_pixels,
        )
        self.patch, self.superpixels, self.patch_label = patch, superpixels, patch_label

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict[str, Any]:
        """Build the constructor arguments from ``INPUT.SEGCLIP``."""
        keys = cfg.INPUT.SEGCLIP
        return {
            "is_train": is_train,
            "size": keys.SIZE,
            "patch": keys.PATCH,
            "crop_scale": tuple(keys.CROP_SCALE),
            "superpixels": tuple(keys.SUPERPIXELS),
            "patch_label": keys.PATCH_LABEL,
            "test_mapper": None if is_train else DetectionMapper(cfg, False),
            "skip_bad_images": cfg.INPUT.SKIP_BAD_IMAGES,
            "exif_orientation": cfg.INPUT.EXIF_ORIENTATION,
            "max_pixels": cfg.INPUT.MAX_PIXELS,
        }

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any] | None:
        """Map one image; random numbers come from torch.

        Args:
            dataset_dict: ``file_name`` and, in training, ``captions``, a list of texts.

        Returns:
            In training ``file_name``, ``image`` (3, S, S) uint8 RGB, ``caption`` and ``segments`` (L,) int64.
            None for a damaged image that is skipped.

        Raises:
            BadImageError: If the image cannot be decoded.
            KeyError: If the record has no captions.
        """
        mapped = super().__call__(dataset_dict)
        if mapped is None or self.test_mapper is not None:
            return mapped
        scale, sigma, least = self.superpixels
        segments = _superpixels(mapped["image"].permute(1, 2, 0).numpy(), scale, sigma, int(least))
        mapped["segments"] = patch_segments(torch.from_numpy(segments), self.patch, self.patch_label)
        return mapped


def _superpixels(image: np.ndarray, scale: float, sigma: float, least: int) -> np.ndarray:
    """Segment an image (H, W, 3) by Felzenszwalb and Huttenlocher's method (IJCV 2004); (H, W) int64."""
    try:
        from skimage.segmentation import felzenszwalb
    except ImportError as error:
        raise ImportError(
            "SegCLIP's superpixels need the package scikit-image: pip install scikit-image"
        ) from error
    segments: np.ndarray = felzenszwalb(image, scale=scale, sigma=sigma, min_size=least)
    return segments.astype(np.int64)
