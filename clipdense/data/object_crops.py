"""Objects of a detection dataset as single images with one class each, for image classification."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms import functional as F

from clipdense.data.image import MAX_PIXELS, Orientation
from clipdense.data.mappers import MAPPER_REGISTRY, check_orientation, read_image_or_skip

from detectron2.config import CfgNode, configurable
from detectron2.data import DatasetCatalog
from detectron2.structures import BoxMode

__all__ = ["ObjectCropMapper", "few_shot", "object_crops"]

_MIN_SIDE = 8.0  # pixels; smaller objects show nothing


def object_crops(dataset: str, shots: int = 0, seed: int = 1) -> list[dict[str, Any]]:
    """List the objects of a registered dataset, without crowds and objects with a side below 8 pixels.

    Args:
        dataset: name of a dataset with boxes and classes.
        shots: number of objects of each class, see `few_shot`; 0: all.
        seed: of the choice of the shots.

    Returns:
        Dicts with ``file_name``, ``height`` and ``width`` of the image in pixels, ``image_id``, ``bbox`` (x0,
        y0, x1, y1) and ``label``, the class.

    Raises:
        ValueError: If no object is left.
    """
    crops = []
    for record in DatasetCatalog.get(dataset):
        shared = {key: record[key] for key in ("file_name", "height", "width", "image_id") if key in record}
        for annotation in record.get("annotations", ()):
            x0, y0, x1, y1 = BoxMode.convert(
                list(annotation["bbox"]), annotation["bbox_mode"], BoxMode.XYXY_ABS
            )
            if not annotation.get("iscrowd", 0) and min(x1 - x0, y1 - y0) >= _MIN_SIDE:
                crops.append(shared | {"bbox": (x0, y0, x1, y1), "label": annotation["category_id"]})
    if not crops:
        raise ValueError(f"dataset {dataset} has no objects with a side of at least {_MIN_SIDE:g} pixels")
    return few_shot(crops, shots, seed) if shots else crops


def few_shot(crops: Sequence[dict[str, Any]], shots: int, seed: int) -> list[dict[str, Any]]:
    """Draw objects of each class without replacement; all of a class with fewer objects.

    The choice of more shots contains that of fewer shots with the same seed.

    Args:
        crops: see `object_crops`.
        shots: number of objects of each class.
        seed: of the choice.

    Returns:
        The objects, ordered by class.

    Source: CoOp (Zhou et al., IJCV 2022), section 4.1: 1, 2, 4, 8 and 16 shots, three seeds.
    """
    by_class: dict[int, list[dict[str, Any]]] = {}
    for crop in crops:
        by_class.setdefault(crop["label"], []).append(crop)
    chosen = []
    for label, members in sorted(by_class.items()):
        order = np.random.default_rng([seed, label]).permutation(len(members))
        chosen += [members[i] for i in order[:shots]]
    return chosen


@MAPPER_REGISTRY.register()
class ObjectCropMapper:
    """Mapper from an object to a square image around it.

    In training, a random part of the square is resized to the size of the CLIP, and flipped with probability
    1/2, as CoOp does with whole images. Pixels beyond the image are black.

    Args:
        is_train: whether crops are random.
        size: side of the image in pixels.
        context: side of the square, relative to the longer side of the object's box.
        scale: range of the area of the random part, as a share of the square.
        flip: whether images are flipped at random.
        skip_bad_images: return None for a damaged image, with a warning, instead of raising an error (in
            training only).
        exif_orientation: "auto", "apply" or "ignore", see `clipdense.data.image.read_image`.
        max_pixels: largest image, in pixels.
    """

    @configurable
    def __init__(
        self,
        is_train: bool = True,
        *,
        size: int = 224,
        context: float = 1.2,
        scale: tuple[float, float] = (0.5, 1.0),
        flip: bool = True,
        skip_bad_images: bool = False,
        exif_orientation: Orientation = "auto",
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        self.is_train, self.size, self.context, self.scale, self.flip = is_train, size, context, scale, flip
        self.skip_bad_images = skip_bad_images and is_train
        check_orientation(exif_orientation)
        self.exif_orientation: Orientation = exif_orientation
        self.max_pixels = max_pixels

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict[str, Any]:
        """Build the constructor arguments from ``INPUT.OBJECT_CROP``, RANDOM_FLIP and SKIP_BAD_IMAGES."""
        keys = cfg.INPUT.OBJECT_CROP
        return {
            "is_train": is_train,
            "size": keys.SIZE,
            "context": keys.CONTEXT,
            "scale": tuple(keys.SCALE),
            "flip": cfg.INPUT.RANDOM_FLIP == "horizontal",
            "skip_bad_images": cfg.INPUT.SKIP_BAD_IMAGES,
            "exif_orientation": cfg.INPUT.EXIF_ORIENTATION,
            "max_pixels": cfg.INPUT.MAX_PIXELS,
        }

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any] | None:
        """Map one object; random numbers come from torch.

        Args:
            dataset_dict: an object, see `object_crops`.

        Returns:
            ``file_name``, ``image_id``, ``image`` (3, S, S) uint8 RGB and ``label``. None for a damaged image
            that is skipped.

        Raises:
            BadImageError: If the image cannot be decoded.
            KeyError: If the record is not an object.
        """
        if "bbox" not in dataset_dict:
            raise KeyError(
                f"{dataset_dict.get('file_name')}: INPUT.MAPPER ObjectCropMapper reads objects; list the "
                "dataset in DATASETS.OBJECT_CROPS"
            )
        pixels = read_image_or_skip(
            dataset_dict, "RGB", self.skip_bad_images, self.exif_orientation, self.max_pixels
        )
        if pixels is None:
            return None
        image = torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))
        kept = {key: dataset_dict[key] for key in ("file_name", "image_id", "label") if key in dataset_dict}
        return kept | {"image": self.crop(image, dataset_dict["bbox"])}

    def crop(self, image: Tensor, box: Sequence[float]) -> Tensor:
        """Cut the square around a box (x0, y0, x1, y1) from an image (3, H, W); (3, S, S)."""
        x0, y0, x1, y1 = box
        side = max(1, round(self.context * max(x1 - x0, y1 - y0)))
        top, left = round((y0 + y1 - side) / 2), round((x0 + x1 - side) / 2)
        height = width = side
        if self.is_train:
            square = torch.empty(1, side, side, device="meta")
            i, j, height, width = RandomResizedCrop.get_params(square, list(self.scale), [3 / 4, 4 / 3])
            top, left = top + i, left + j
        size = [self.size, self.size]
        crop: Tensor = F.resized_crop(image, top, left, height, width, size, antialias=True)
        if self.is_train and self.flip and torch.rand(()) < 0.5:
            crop = crop.flip(2)
        return crop
