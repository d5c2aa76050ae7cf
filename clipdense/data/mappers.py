"""Mappers from dataset dicts to model inputs."""

import copy
import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from fvcore.common.registry import Registry

from clipdense.data.image import (
    MAX_PIXELS,
    BadImageError,
    ImageFormat,
    Orientation,
    header_size,
    read_image,
    read_labels,
)

from detectron2.config import CfgNode, configurable
from detectron2.data import detection_utils as utils
from detectron2.data import transforms as T
from detectron2.structures import BitMasks, Instances, PolygonMasks

__all__ = [
    "MAPPER_REGISTRY",
    "DetectionMapper",
    "ResizeShortestEdge",
    "build_augmentations",
    "build_mapper",
    "check_orientation",
    "map_image",
    "original_sample",
    "read_image_or_skip",
    "transform_labels",
    "warn_of_skipping",
]

logger = logging.getLogger(__name__)

MAPPER_REGISTRY = Registry("MAPPER")
MAPPER_REGISTRY.__doc__ = (
    """Mappers by name (``INPUT.MAPPER``); each is built as ``mapper(cfg, is_train)``."""
)

_warned: set[str] = set()


def build_mapper(cfg: CfgNode, is_train: bool) -> Any:
    """Build the mapper ``INPUT.MAPPER``.

    Raises:
        KeyError: If there is no such mapper; names those that exist.
    """
    name = cfg.INPUT.MAPPER
    if name not in MAPPER_REGISTRY:
        known = ", ".join(sorted(key for key, _ in MAPPER_REGISTRY))
        raise KeyError(f"INPUT.MAPPER = {name!r} is not a mapper; known: {known}")
    return MAPPER_REGISTRY.get(name)(cfg, is_train)


def check_orientation(orientation: str) -> None:
    """Raise a ValueError if ``INPUT.EXIF_ORIENTATION`` has an unknown value."""
    if orientation not in ("auto", "apply", "ignore"):
        raise ValueError(f"INPUT.EXIF_ORIENTATION = {orientation!r}: expected auto, apply or ignore")


def read_image_or_skip(
    record: Mapping[str, Any],
    image_format: ImageFormat,
    skip: bool,
    orientation: Orientation = "auto",
    max_pixels: int = MAX_PIXELS,
) -> np.ndarray | None:
    """Read an image; with ``skip``, return None for a damaged or missing file and warn.

    Args:
        record: dataset dict with ``file_name`` and, optionally, ``height`` and ``width`` or a label map.
        image_format: order of the channels.
        skip: whether a damaged or missing file is skipped instead of raising an error.
        orientation, max_pixels: see `read_image`.
    """
    path = record["file_name"]
    try:
        return read_image(
            path, image_format, size=_stated_size(record), orientation=orientation, max_pixels=max_pixels
        )
    except (BadImageError, FileNotFoundError) as error:
        if not skip:
            raise
        warn_of_skipping(error)
        return None


def warn_of_skipping(error: OSError) -> None:
    """Warn that a sample is skipped, once for each process and error."""
    if str(error) not in _warned:
        _warned.add(str(error))
        logger.warning("Skipping a damaged sample: %s", error)


def _stated_size(record: Mapping[str, Any]) -> tuple[int, int] | None:
    """Return the size (H, W) that a record states, or else that of its label map, which was drawn over it."""
    if "height" in record and "width" in record:
        return record["height"], record["width"]
    labels = record.get("sem_seg_file_name") or record.get("pan_seg_file_name")
    return None if labels is None else header_size(labels, "ignore")


class ResizeShortestEdge(T.ResizeShortestEdge):
    """Detectron2's augmentation, extended to very long images: a side has at least 1 pixel."""

    def get_transform(self, image: np.ndarray) -> T.Transform:
        """Return the transform of an (H, W, C) image."""
        transform = super().get_transform(image)
        if isinstance(transform, T.ResizeTransform):
            transform.new_h, transform.new_w = max(1, transform.new_h), max(1, transform.new_w)
        return transform


def build_augmentations(cfg: CfgNode, is_train: bool) -> list[Any]:
    """Build Detectron2's augmentations of ``INPUT.*``.

    In training these are cropping if enabled, resizing (or large-scale jitter) and flipping; else resizing.
    """
    keys = cfg.INPUT
    if not is_train:
        return [ResizeShortestEdge(keys.MIN_SIZE_TEST, keys.MAX_SIZE_TEST, "choice")]
    resize: list[Any] = [
        ResizeShortestEdge(keys.MIN_SIZE_TRAIN, keys.MAX_SIZE_TRAIN, keys.MIN_SIZE_TRAIN_SAMPLING)
    ]
    if keys.SCALE_JITTER.ENABLED:
        side = keys.SCALE_JITTER.SIZE
        scaled = T.ResizeScale(*keys.SCALE_JITTER.RANGE, target_height=side, target_width=side)
        resize = [scaled, T.FixedSizeCrop((side, side), pad=False)]
    crop = [T.RandomCrop(keys.CROP.TYPE, keys.CROP.SIZE)] if keys.CROP.ENABLED else []
    # Detectron2's list starts with its own resizing
    return [*crop, *resize, *utils.build_augmentation(cfg, is_train)[1:]]


def map_image(mapper: Any, image: np.ndarray) -> dict[str, Any]:
    """Prepare an image that does not belong to a dataset, as a mapper does in evaluation.

    Args:
        mapper: a `DetectionMapper`, Detectron2's `DatasetMapper`, or another with their ``augmentations``.
        image: (H, W, C) uint8, with the channel order of the mapper's ``image_format``.

    Returns:
        ``image`` (C, h, w) uint8 and the original ``height`` and ``width``.
    """
    augmented = T.AugInput(image)
    mapper.augmentations(augmented)
    return {"image": _to_tensor(augmented.image), "height": image.shape[0], "width": image.shape[1]}


def original_sample(
    record: dict[str, Any], orientation: Orientation = "auto", max_pixels: int = MAX_PIXELS
) -> dict[str, Any]:
    """Read the test input of models that are evaluated by their features: an image that is not resized.

    Args:
        record: dataset dict with ``file_name`` and, optionally, ``height`` and ``width``.
        orientation, max_pixels: see `read_image`.

    Returns:
        ``file_name``, ``image_id`` if the record has one, and ``image`` (3, H, W) uint8 RGB.

    Raises:
        BadImageError: If the image cannot be decoded.
    """
    sample = {key: record[key] for key in ("file_name", "image_id") if key in record}
    pixels = read_image_or_skip(record, "RGB", False, orientation, max_pixels)
    assert pixels is not None
    return sample | {"image": _to_tensor(pixels)}


def _to_tensor(image: np.ndarray) -> torch.Tensor:
    return torch.as_tensor(np.ascontiguousarray(image.transpose(2, 0, 1)))


def transform_labels(transforms: T.Transform, labels: np.ndarray) -> np.ndarray:
    """Apply a transform to an (H, W) label map of integers below 2^24; returns int64 labels.

    Detectron2 resizes uint8 maps with Pillow's nearest neighbour, which is aligned with the image, but other
    types with torch's, which is shifted by half a pixel. Wide labels are therefore transformed as three
    uint8 planes.
    """
    if labels.max(initial=0) < 256:
        return transforms.apply_segmentation(labels.astype(np.uint8)).astype(np.int64)
    planes = np.stack([labels & 255, labels >> 8 & 255, labels >> 16 & 255], axis=-1).astype(np.uint8)
    planes = transforms.apply_segmentation(planes).astype(np.int64)
    return planes[..., 0] + (planes[..., 1] << 8) + (planes[..., 2] << 16)


@MAPPER_REGISTRY.register()
class DetectionMapper:
    """Mapper of images with boxes, masks, semantic and panoptic maps, as far as the dataset has them.

    In addition to Detectron2's `DatasetMapper`, it reads more image formats (see `read_image`), accepts
    polygons and RLE in one dataset, clips boxes to the image, drops empty ones, and names the file in errors.

    Args:
        is_train: whether annotations are mapped.
        augmentations: Detectron2 augmentations or transforms.
        image_format: "RGB" or "BGR".
        use_masks: whether instances have ``gt_masks``.
        mask_format: "polygon" (images with RLE masks still get bit masks) or "bitmask".
        recompute_boxes: recompute tight boxes from masks, after cropping.
        skip_bad_images: return None for a damaged image, with a warning, instead of raising an error (in
            training only).
        exif_orientation: "auto", "apply" or "ignore", see `read_image`.
        max_pixels: largest image, in pixels.
    """

    @configurable
    def __init__(
        self,
        is_train: bool,
        *,
        augmentations: list[Any],
        image_format: ImageFormat,
        use_masks: bool = False,
        mask_format: str = "polygon",
        recompute_boxes: bool = False,
        skip_bad_images: bool = False,
        exif_orientation: Orientation = "auto",
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        check_orientation(exif_orientation)
        if mask_format not in ("polygon", "bitmask"):
            raise ValueError(f"INPUT.MASK_FORMAT = {mask_format!r}: expected polygon or bitmask")
        if recompute_boxes and not use_masks:
            raise ValueError("boxes can only be recomputed from masks: set MODEL.MASK_ON True")
        self.is_train = is_train
        self.augmentations = T.AugmentationList(augmentations)
        self.image_format = image_format
        self.use_masks = use_masks
        self.mask_format = mask_format
        self.recompute_boxes = recompute_boxes
        self.skip_bad_images = skip_bad_images and is_train
        self.exif_orientation: Orientation = exif_orientation
        self.max_pixels = max_pixels

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict[str, Any]:
        """Build the constructor arguments from ``INPUT.*`` and ``MODEL.MASK_ON``.

        Raises:
            ValueError: If the config needs keypoints or stored proposals, which only Detectron2's mapper
                reads.
        """
        if cfg.MODEL.KEYPOINT_ON or cfg.MODEL.LOAD_PROPOSALS:
            raise ValueError(
                "INPUT.MAPPER DetectionMapper reads neither keypoints nor stored proposals: set "
                "MODEL.KEYPOINT_ON and MODEL.LOAD_PROPOSALS False, or register detectron2's DatasetMapper"
            )
        return {
            "is_train": is_train,
            "augmentations": build_augmentations(cfg, is_train),
            "image_format": cfg.INPUT.FORMAT,
            "use_masks": cfg.MODEL.MASK_ON,
            "mask_format": cfg.INPUT.MASK_FORMAT,
            "recompute_boxes": is_train and cfg.INPUT.CROP.ENABLED and cfg.MODEL.MASK_ON,
            "skip_bad_images": cfg.INPUT.SKIP_BAD_IMAGES,
            "exif_orientation": cfg.INPUT.EXIF_ORIENTATION,
            "max_pixels": cfg.INPUT.MAX_PIXELS,
        }

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any] | None:
        """Map the dataset dict of one image.

        Returns:
            The dict with ``image`` (3, H, W) uint8. In training, depending on the dataset, also ``instances``
            (gt_boxes, gt_classes, gt_masks; gt_has_mask if an object has none), ``sem_seg`` (H, W) int64, and
            ``pan_seg`` (H, W) int64 with the ids of ``segments_info``. None for a damaged image that is
            skipped.

        Raises:
            BadImageError: If the image or a label map cannot be decoded.
            ValueError: If annotations do not fit the image; names it.
        """
        sample = copy.deepcopy(dataset_dict)
        image = read_image_or_skip(
            sample, self.image_format, self.skip_bad_images, self.exif_orientation, self.max_pixels
        )
        if image is None:
            return None
        utils.check_image_size(sample, image)
        labels = None
        if self.is_train and "sem_seg_file_name" in sample:
            labels = self._labels(sample.pop("sem_seg_file_name"), image)
        shown = labels
        if labels is not None:  # Detectron2 resizes only uint8 and floats
            shown = labels.astype(np.uint8 if labels.max(initial=0) < 256 else np.float32)
        augmented = T.AugInput(image, sem_seg=shown)
        transforms = self.augmentations(augmented)
        height, width = augmented.image.shape[:2]
        sample["image"] = _to_tensor(augmented.image)
        if not self.is_train:
            for key in ("annotations", "sem_seg_file_name", "pan_seg_file_name"):
                sample.pop(key, None)
            return sample
        if labels is not None:
            sample["sem_seg"] = torch.as_tensor(transform_labels(transforms, labels))
        if "pan_seg_file_name" in sample:
            segments = self._labels(sample.pop("pan_seg_file_name"), image)
            sample["pan_seg"] = torch.as_tensor(transform_labels(transforms, segments))
        if "annotations" in sample:
            try:
                sample["instances"] = self._instances(sample.pop("annotations"), transforms, (height, width))
            except (ValueError, AssertionError, KeyError, TypeError) as error:
                raise ValueError(f"annotations of {sample['file_name']} do not fit: {error!r}") from error
        return sample

    def _labels(self, path: str, image: np.ndarray) -> np.ndarray:
        """Read a label map of the size of the image."""
        labels = read_labels(path, max_pixels=self.max_pixels)
        if labels.shape != image.shape[:2]:
            raise ValueError(
                f"{path} is {labels.shape[0]} x {labels.shape[1]}, but its image {image.shape[0]} x "
                f"{image.shape[1]} (height x width); give the label map that belongs to the image"
            )
        return labels

    def _instances(
        self, annotations: list[dict[str, Any]], transforms: Any, size: tuple[int, int]
    ) -> Instances:
        """Build the instances of the transformed image: without crowds, with clipped and non-empty boxes."""
        objects, has_mask = [], []
        for annotation in annotations:
            if annotation.get("iscrowd", 0):
                continue
            annotation.pop("keypoints", None)
            if not self.use_masks:
                annotation.pop("segmentation", None)
            elif "segmentation" not in annotation:
                raise ValueError("an annotation has no mask; set MODEL.MASK_ON False to train on boxes alone")
            has_mask.append(annotation.pop("has_mask", True))
            if not has_mask[-1]:
                del annotation["segmentation"]  # Detectron2's cropping needs shapely even for no polygon
            moved = utils.transform_instance_annotations(annotation, transforms, size)
            if not has_mask[-1]:
                moved["segmentation"] = []
            if isinstance(moved.get("segmentation"), np.ndarray):
                moved["segmentation"] = moved["segmentation"].copy()  # torch needs a writable array
            objects.append(moved)
        polygons = self.mask_format == "polygon" and all(
            isinstance(o.get("segmentation"), list) for o in objects
        )
        instances = utils.annotations_to_instances(objects, size, "polygon" if polygons else "bitmask")
        if self.use_masks and not objects:
            instances.gt_masks = (
                PolygonMasks([]) if polygons else BitMasks(torch.zeros(0, *size, dtype=torch.bool))
            )
        masked = torch.tensor(has_mask, dtype=torch.bool)
        if self.recompute_boxes and objects:
            instances.gt_boxes.tensor[masked] = instances.gt_masks[masked].get_bounding_boxes().tensor
        if self.use_masks and not masked.all():
            instances.gt_has_mask = masked
            empty = instances.gt_masks.nonempty().logical_not()
            instances = instances[~(masked & empty)]
        return utils.filter_empty_instances(instances, by_mask=self.use_masks and bool(masked.all()))
