"""Training input of `MaskAdaptedCLIP`: the masked crop of a mask-category pair, and its noun."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms import RandomResizedCrop

from clipdense.clip.model import pixel_statistics
from clipdense.data.mappers import MAPPER_REGISTRY, original_sample, read_image_or_skip
from clipdense.data.mask_pairs import pair_mask
from clipdense.regions import CropRule, crop_masks, tight_boxes

from detectron2.config import CfgNode, configurable

__all__ = ["MaskPairMapper"]


@MAPPER_REGISTRY.register()
class MaskPairMapper:
    """Masked crops as OVSeg's inference cuts them (Liang et al., CVPR 2023, section 3.2), and a random
    resized crop of each, of image and mask alike.

    The released training cuts, paints and saves regions before it resizes them (with antialiasing), and finds
    the background again by its colour. Here the true mask goes along.

    Args:
        is_train: False gives the image at its own size, see `original_sample`.
        rule: how a mask becomes a crop.
        size: side of a crop in pixels.
        pixel_mean, pixel_std: of the CLIP, RGB, of images in 0 .. 1.
        scale: share of a region's area that a random crop keeps, from and to.
        ratio: width / height of a random crop in pixels, from and to. A region that is longer loses both ends
            (torchvision's `RandomResizedCrop`).
        skip_bad_images: whether a damaged image file gives None, with a warning, instead of an error.
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
        scale: tuple[float, float] = (0.9, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        skip_bad_images: bool = False,
    ) -> None:
        self.is_train, self.rule, self.size = is_train, rule, size
        self.pixel_mean, self.pixel_std = pixel_mean, pixel_std
        self.scale, self.ratio = scale, ratio
        self.skip_bad_images = skip_bad_images

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict[str, Any]:
        """Constructor arguments from ``INPUT.MASK_PAIRS``, ``MODEL.TWO_STAGE.CROP`` and ``MODEL.CLIP``."""
        keys, clip = cfg.INPUT.MASK_PAIRS, cfg.MODEL.CLIP
        arguments: dict[str, Any] = {
            "is_train": is_train,
            "rule": CropRule.from_config(cfg.MODEL.TWO_STAGE.CROP),
        }
        if not is_train:
            return arguments
        mean, std = pixel_statistics(clip.NAME, clip.PRETRAINED, allow_pickle=cfg.MODEL.ALLOW_PICKLE)
        return arguments | {
            "size": keys.SIZE,
            "pixel_mean": mean,
            "pixel_std": std,
            "scale": tuple(keys.CROP_SCALE),
            "ratio": tuple(keys.CROP_RATIO),
            "skip_bad_images": cfg.INPUT.SKIP_BAD_IMAGES,
        }

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any] | None:
        """One pair; randomness is that of torch.

        Args:
            dataset_dict: a pair, see `clipdense.data.mask_pairs`.

        Returns:
            ``file_name`` and, if it is there, ``image_id``; ``region`` (3, S, S) normalised for the CLIP;
            ``region_mask`` (1, S, S), inside where > 0; ``noun``. None for a damaged image that may be
            skipped.

        Raises:
            BadImageError: the image cannot be decoded.
            ValueError: a mask of another size than the image, or an empty one; names both.
        """
        if not self.is_train:
            return original_sample(dataset_dict)
        sample: dict[str, Any] = {
            key: dataset_dict[key] for key in ("file_name", "image_id") if key in dataset_dict
        }
        pixels = read_image_or_skip(dataset_dict["file_name"], "RGB", self.skip_bad_images)
        if pixels is None:
            return None
        mask = torch.from_numpy(pair_mask(dataset_dict))
        what = f"{dataset_dict['file_name']}: the mask of {dataset_dict['noun']!r}"
        if mask.shape != pixels.shape[:2]:
            raise ValueError(f"{what} is of {tuple(mask.shape)}, the image of {pixels.shape[:2]}")
        if not mask.any():
            raise ValueError(f"{what} is empty")
        region, region_mask = self.crop(torch.from_numpy(pixels).permute(2, 0, 1), mask)
        return sample | {"region": region, "region_mask": region_mask, "noun": dataset_dict["noun"]}

    def crop(self, image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """A random resized crop of what a mask shows.

        Args:
            image: (3, H, W) uint8 RGB.
            mask: (H, W) bool, not empty.

        Returns:
            The region (3, S, S), normalised, and its mask (1, S, S).
        """
        if self.rule.sampling == "bicubic" and self.rule.expand == 1:  # nothing beyond the box is seen
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
        top, left, height, width = RandomResizedCrop.get_params(shape, list(self.scale), list(self.ratio))
        x, y = x0 + left, y0 + top
        if mask[y : y + height, x : x + width].any():  # else the ends that it loses are all that is inside
            crops = replace(crops, boxes=torch.tensor([[x, y, x + width, y + height]]))
        return crops.regions()[0], crops.region_masks()[0]
