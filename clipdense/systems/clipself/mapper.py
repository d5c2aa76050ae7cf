"""Training input of CLIPSelf: a letterboxed image, regions of it, and the teacher's crops of them."""

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clipdense.data.image import MAX_PIXELS, Orientation
from clipdense.data.letterbox import Uint8, crop_box, letterbox
from clipdense.data.mappers import (
    MAPPER_REGISTRY,
    check_orientation,
    original_sample,
    read_image_or_skip,
)
from clipdense.systems.clipself.regions import Regions, add_jittered, draw_patches, draw_proposals

from detectron2.config import CfgNode, configurable
from detectron2.structures import BoxMode

__all__ = ["CLIPSelfMapper"]

_CROP_SCALES = {"patches": 1.0, "proposals": 1.5, "concepts": 1.0}


@MAPPER_REGISTRY.register()
class CLIPSelfMapper:
    """Letterboxed images, their regions and the teacher's crops (Wu et al., CLIPSelf, ICLR 2024, Sec. 3).

    Crops are cut from the image at its own resolution.

    Args:
        is_train: False gives the image at its own size, see `original_sample`.
        regions: "patches", "proposals" or "concepts".
        image_size: side of the student's image in pixels.
        crop_size: side of a crop in pixels.
        max_boxes: maximum number of regions of an image.
        max_split: maximum number of rows and of columns of a grid of patches.
        crop_scale: factor by which regions are enlarged for their crops; None: as published, 1 for patches
            and 1.5 for proposals.
        jitter: number of jittered copies of each region, see `add_jittered`.
        skip_bad_images: whether a damaged image file gives None, with a warning, instead of an error.
        exif_orientation: "auto", "apply" or "ignore", see `clipdense.data.image.read_image`.
        max_pixels: largest image, in pixels.

    Raises:
        ValueError: If ``regions`` or ``exif_orientation`` has another value.
    """

    @configurable
    def __init__(
        self,
        is_train: bool = True,
        *,
        regions: str = "patches",
        image_size: int = 1024,
        crop_size: int = 224,
        max_boxes: int = 20,
        max_split: int = 6,
        crop_scale: float | None = None,
        jitter: int = 0,
        skip_bad_images: bool = False,
        exif_orientation: Orientation = "auto",
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        check_orientation(exif_orientation)
        if regions not in _CROP_SCALES:
            raise ValueError(f"INPUT.CLIPSELF.REGIONS {regions!r}: expected {', '.join(_CROP_SCALES)}")
        self.regions, self.image_size, self.crop_size = regions, image_size, crop_size
        self.max_boxes, self.max_split = max_boxes, max_split
        self.crop_scale = _CROP_SCALES[regions] if crop_scale is None else crop_scale
        self.jitter = jitter
        self.exif_orientation: Orientation = exif_orientation
        self.max_pixels = max_pixels
        self.is_train, self.skip_bad_images = is_train, skip_bad_images

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict[str, Any]:
        """Read the constructor arguments from ``INPUT.CLIPSELF``."""
        keys = cfg.INPUT.CLIPSELF
        return {
            "is_train": is_train,
            "regions": keys.REGIONS,
            "image_size": keys.IMAGE_SIZE,
            "crop_size": keys.CROP_SIZE,
            "max_boxes": keys.MAX_BOXES,
            "max_split": keys.MAX_SPLIT,
            "crop_scale": keys.CROP_SCALE or None,
            "jitter": keys.JITTER,
            "skip_bad_images": cfg.INPUT.SKIP_BAD_IMAGES,
            "exif_orientation": cfg.INPUT.EXIF_ORIENTATION,
            "max_pixels": cfg.INPUT.MAX_PIXELS,
        }

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any] | None:
        """Map one image; regions are drawn with Python's `random`.

        Args:
            dataset_dict: ``file_name`` and ``image_id``; unless the regions are patches, ``annotations`` with
                ``bbox``, for concepts also ``category_id``.

        Returns:
            ``file_name``, ``image_id``; ``image`` (3, S, S) uint8 RGB; ``boxes`` (n, 4), xyxy relative to S
            (range 0 to 1); and ``crops`` (n, 3, s, s) uint8 RGB, or for concepts ``concepts`` (n,) int64.
            None for a damaged image that may be skipped.

        Raises:
            KeyError: If the regions come from annotations and there are none.
            BadImageError: If the image cannot be decoded.
        """
        if not self.is_train:
            return original_sample(dataset_dict, self.exif_orientation, self.max_pixels)
        sample = {key: dataset_dict[key] for key in ("file_name", "image_id")}
        image = read_image_or_skip(
            dataset_dict, "RGB", self.skip_bad_images, self.exif_orientation, self.max_pixels
        )
        if image is None:
            return None
        sample["image"] = _to_tensor(letterbox(image, self.image_size)[0])
        if self.regions == "concepts":
            return sample | self._concepts(dataset_dict, image)
        regions = self.draw(dataset_dict, image.shape[:2])
        crops = [crop_box(image, tuple(box), self.crop_size) for box in regions.crops[regions.valid]]
        sample["boxes"] = _relative(regions.boxes[regions.valid], image)
        sample["crops"] = _to_tensor(np.stack(crops))
        return sample

    def draw(self, record: dict[str, Any], image_size: tuple[int, int]) -> Regions:
        """Draw the patches or proposals of an image of (H, W) pixels, and their jittered copies."""
        rng = random.Random(random.getrandbits(64))
        regions = self._draw(record, image_size, rng)
        if not self.jitter:
            return regions
        return add_jittered(regions, image_size, rng, copies=self.jitter, crop_scale=self.crop_scale)

    def _draw(self, record: dict[str, Any], image_size: tuple[int, int], rng: random.Random) -> Regions:
        if self.regions == "patches":
            return draw_patches(
                image_size,
                rng,
                max_split=self.max_split,
                max_boxes=self.max_boxes,
                crop_scale=self.crop_scale,
            )
        boxes = [_xywh(annotation) for annotation in self._annotations(record)]
        return draw_proposals(boxes, image_size, rng, max_boxes=self.max_boxes, crop_scale=self.crop_scale)

    def _concepts(self, record: dict[str, Any], image: Uint8) -> dict[str, Tensor]:
        """Return the first boxes, of any size, and their classes."""
        annotations = self._annotations(record)[: self.max_boxes]
        xywh = np.array([_xywh(annotation) for annotation in annotations], float).reshape(-1, 4)
        xywh[:, 2:] += xywh[:, :2]
        concepts = torch.tensor([annotation["category_id"] for annotation in annotations], dtype=torch.long)
        return {"boxes": _relative(xywh, image), "concepts": concepts}

    def _annotations(self, record: dict[str, Any]) -> list[dict[str, Any]]:
        if "annotations" not in record:
            raise KeyError(
                f"{record['file_name']} has no annotations, which INPUT.CLIPSELF.REGIONS {self.regions} "
                "needs; set it to patches for images without annotations"
            )
        annotations: list[dict[str, Any]] = record["annotations"]
        return annotations


def _xywh(annotation: dict[str, Any]) -> list[float]:
    box: list[float] = BoxMode.convert(list(annotation["bbox"]), annotation["bbox_mode"], BoxMode.XYWH_ABS)
    return box


def _relative(boxes: np.ndarray, image: Uint8) -> Tensor:
    """Convert boxes in pixels of the image to boxes relative to the padded square."""
    return torch.from_numpy(boxes / max(image.shape[:2])).float()


def _to_tensor(pixels: Uint8) -> Tensor:
    """Convert (..., H, W, 3) to (..., 3, H, W)."""
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(pixels, -1, -3)))
