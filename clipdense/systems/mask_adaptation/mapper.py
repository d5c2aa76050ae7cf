"""Training input of `MaskAdaptedCLIP`: masked crops of mask-category pairs, with their nouns."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms import RandomResizedCrop

from clipdense.clip.model import pixel_statistics
from clipdense.data.image import MAX_PIXELS, BadSampleError, Orientation
from clipdense.data.mappers import (
    MAPPER_REGISTRY,
    check_orientation,
    original_sample,
    read_image_or_skip,
)
from clipdense.data.mask_pairs import pair_mask
from clipdense.regions import CropRule, crop_masks, tight_boxes

from detectron2.config import CfgNode, configurable

__all__ = ["MaskPairMapper"]


@MAPPER_REGISTRY.register()
class MaskPairMapper:
    """Mapper from a mask-category pair to a random resized crop of its masked region (OVSeg, Liang et al.,
    CVPR 2023, section 3.2), cut as at inference.

    The released training saves painted regions, resizes them with antialiasing, and recovers the background
    from its colour. This mapper crops image and mask together and keeps the true mask.

    Args:
        is_train: False returns the image at its own size, see `original_sample`.
        rule: defines how a mask becomes a crop.
        size: side of a crop in pixels.
        pixel_mean, pixel_std: pixel statistics of the CLIP: RGB, for values 0 to 1.
        crop_scale: range of the area of a random crop, as a share of the region's area.
        crop_ratio: range of width / height of a random crop in pixels. A longer region loses both ends
            (torchvision's `RandomResizedCrop`).
        skip_bad_images: return None for a damaged image, with a warning, instead of raising an error.
        exif_orientation: "auto", "apply" or "ignore", see `clipdense.data.image.read_image`.
        max_pixels: largest image, in pixels.
    """

    @configurable
    def __init__(
        self,
        is_train: bool = True,
        *,
        rule: CropRule,
        size: int = 224,
        pixel_mean: Sequence[float] = (0.0, 0.0, 0.0),
        pixel_std: Sequence[float] = (1.0, 1.0, 1.0),
        crop_scale: tuple[float, float] = (0.9, 1.0),
        crop_ratio: tuple[float, float] = (3 / 4, 4 / 3),
        skip_bad_images: bool = False,
        exif_orientation: Orientation = "auto",
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        check_orientation(exif_orientation)
        self.exif_orientation: Orientation = exif_orientation
        self.max_pixels = max_pixels
        self.is_train, self.rule, self.size = is_train, rule, size
        self.pixel_mean, self.pixel_std = pixel_mean, pixel_std
        self.crop_scale, self.crop_ratio = crop_scale, crop_ratio
        self.skip_bad_images = skip_bad_images

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict[str, Any]:
        """Build the constructor arguments from ``INPUT.MASK_PAIRS``, ``MODEL.MASK_ADAPTED_CLIP.CROP`` and
        ``MODEL.CLIP``."""
        keys, clip = cfg.INPUT.MASK_PAIRS, cfg.MODEL.CLIP
        arguments: dict[str, Any] = {
            "is_train": is_train,
            "rule": CropRule.from_config(cfg.MODEL.MASK_ADAPTED_CLIP.CROP),
            "exif_orientation": cfg.INPUT.EXIF_ORIENTATION,
            "max_pixels": cfg.INPUT.MAX_PIXELS,
        }
        if not is_train:
            return arguments
        mean, std = pixel_statistics(clip.NAME, clip.PRETRAINED, allow_pickle=cfg.MODEL.ALLOW_PICKLE)
        return arguments | {
            "size": keys.SIZE,
            "pixel_mean": mean,
            "pixel_std": std,
            "crop_scale": tuple(keys.CROP_SCALE),
            "crop_ratio": tuple(keys.CROP_RATIO),
            "skip_bad_images": cfg.INPUT.SKIP_BAD_IMAGES,
        }

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any] | None:
        """Map one pair; random numbers come from torch.

        Args:
            dataset_dict: a pair, see `clipdense.data.mask_pairs`.

        Returns:
            ``file_name`` and, if given, ``image_id``; ``region`` (3, S, S), normalised for the CLIP;
            ``region_mask`` (1, S, S), above 0 inside the mask; ``noun``. None for a damaged image that is
            skipped.

        Raises:
            BadImageError: If the image cannot be decoded.
            BadSampleError: If the mask is empty, or has another size than the image; names both.
        """
        if not self.is_train:
            return original_sample(dataset_dict, self.exif_orientation, self.max_pixels)
        sample: dict[str, Any] = {
            key: dataset_dict[key] for key in ("file_name", "image_id") if key in dataset_dict
        }
        pixels = read_image_or_skip(
            dataset_dict, "RGB", self.skip_bad_images, self.exif_orientation, self.max_pixels
        )
        if pixels is None:
            return None
        mask = torch.from_numpy(pair_mask(dataset_dict))
        what = f"{dataset_dict['file_name']}: the mask of {dataset_dict['noun']!r}"
        if mask.shape != pixels.shape[:2]:
            raise BadSampleError(f"{what} has size {tuple(mask.shape)}, the image {pixels.shape[:2]}")
        if not mask.any():
            raise BadSampleError(f"{what} is empty")
        region, region_mask = self.crop(torch.from_numpy(pixels).permute(2, 0, 1), mask)
        return sample | {"region": region, "region_mask": region_mask, "noun": dataset_dict["noun"]}

    def crop(self, image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Cut a random resized crop from a masked region.

        Args:
            image: (3, H, W) uint8 RGB.
            mask: (H, W) bool, not empty.

        Returns:
            The region (3, S, S), normalised, and its mask (1, S, S).
        """
        if self.rule.sampling == "bicubic" and self.rule.expand == 1:  # no pixel beyond the box is read
            x0, y0, x1, y1 = tight_boxes(mask[None])[0].int().tolist()
            image, mask = image[:, y0:y1, x0:x1], mask[y0:y1, x0:x1]
        crops = crop_masks(
            image,
            mask[None],
            self.rule,
            size=self.size,
            pixel_mean=self.pixel_mean,
            pixel_std=self.pixel_std,
        )
        x0, y0, x1, y1 = crops.boxes[0].tolist()
        shape = torch.empty(1, y1 - y0, x1 - x0, device="meta")
        top, left, height, width = RandomResizedCrop.get_params(
            shape, list(self.crop_scale), list(self.crop_ratio)
        )
        x, y = x0 + left, y0 + top
        if mask[y : y + height, x : x + width].any():  # else the crop would contain nothing of the mask
            crops = replace(crops, boxes=torch.tensor([[x, y, x + width, y + height]]))
        return crops.regions()[0], crops.region_masks()[0]
