"""Training input of systems that learn from images with captions."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms import functional as F

from clipdense.clip.templates import get as template_set
from clipdense.data.image import MAX_PIXELS, Orientation
from clipdense.data.mappers import (
    MAPPER_REGISTRY,
    DetectionMapper,
    check_orientation,
    read_image_or_skip,
)
from clipdense.data.nouns import NounFinder

from detectron2.config import CfgNode, configurable

__all__ = ["CaptionMapper"]


@MAPPER_REGISTRY.register()
class CaptionMapper:
    """Mapper from a captioned image to a random crop and one of its captions.

    A share of the captions is replaced by a prompt about one of their nouns, as PACL does. In evaluation it
    is `DetectionMapper`.

    Args:
        is_train: whether crops are random.
        size: side of the crops in pixels.
        crop_scale: range of the area of a crop, as a share of the image.
        noun_share: share of the captions, 0 to 1, that become a prompt about one of their nouns, if they have
            any. More than 0 needs spaCy.
        noun_templates: prompt templates of the nouns, one of which is drawn.
        test_mapper: mapper of evaluation.
        skip_bad_images: return None for a damaged image, with a warning, instead of raising an error (in
            training only).
        exif_orientation: "auto", "apply" or "ignore", see `clipdense.data.image.read_image`.
        max_pixels: largest image, in pixels.

    Raises:
        ImportError: If nouns are asked for and spaCy is not installed.
        ValueError: If the template set is unknown.
    """

    @configurable
    def __init__(
        self,
        is_train: bool = True,
        *,
        size: int = 224,
        crop_scale: tuple[float, float] = (0.5, 1.0),
        noun_share: float = 0.0,
        noun_templates: str = "sub_imagenet_7",
        test_mapper: DetectionMapper | None = None,
        skip_bad_images: bool = False,
        exif_orientation: Orientation = "auto",
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        self.is_train, self.size, self.crop_scale = is_train, size, crop_scale
        self.noun_share = noun_share
        self.noun_templates = template_set(noun_templates)
        self.test_mapper, self.skip_bad_images = test_mapper, skip_bad_images
        check_orientation(exif_orientation)
        self.exif_orientation: Orientation = exif_orientation
        self.max_pixels = max_pixels
        self._nouns = NounFinder() if is_train and noun_share else None

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict[str, Any]:
        """Build the constructor arguments from ``INPUT.CAPTION``."""
        keys = cfg.INPUT.CAPTION
        return {
            "is_train": is_train,
            "size": keys.SIZE,
            "crop_scale": tuple(keys.CROP_SCALE),
            "noun_share": keys.NOUN_SHARE,
            "noun_templates": keys.NOUN_TEMPLATES,
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
            In training ``file_name``, ``image`` (3, S, S) uint8 RGB and ``caption``. None for a damaged image
            that is skipped.

        Raises:
            BadImageError: If the image cannot be decoded.
            KeyError: If the record has no captions.
        """
        if self.test_mapper is not None:
            return self.test_mapper(dataset_dict)
        if not dataset_dict.get("captions"):
            raise KeyError(
                f"{dataset_dict.get('file_name')} has no captions; INPUT.MAPPER {type(self).__name__} "
                "trains on images with captions (DATASETS.CAPTIONS)"
            )
        pixels = read_image_or_skip(
            dataset_dict, "RGB", self.skip_bad_images, self.exif_orientation, self.max_pixels
        )
        if pixels is None:
            return None
        image = torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))
        window = RandomResizedCrop.get_params(image, list(self.crop_scale), [3 / 4, 4 / 3])
        image = F.resized_crop(image, *window, [self.size, self.size], antialias=True)
        if torch.rand(()) < 0.5:
            image = image.flip(2)
        captions = dataset_dict["captions"]
        caption = captions[int(torch.randint(len(captions), ()))]
        return {"file_name": dataset_dict["file_name"], "image": image, "caption": self._noun_prompt(caption)}

    def _noun_prompt(self, caption: str) -> str:
        """Return the caption, or with the probability `noun_share` a prompt about one of its nouns."""
        if self._nouns is None or torch.rand(()) >= self.noun_share:
            return caption
        (nouns,) = self._nouns([caption])
        if not nouns:
            return caption
        noun = nouns[int(torch.randint(len(nouns), ()))]
        return self.noun_templates.fill(noun)[int(torch.randint(len(self.noun_templates), ()))]
