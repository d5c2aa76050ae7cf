"""Captioned crops from datasets of the `shapes` world."""

from typing import Any

import numpy as np
import torch

from clipdense.data.image import read_image, read_labels
from clipdense.data.mappers import MAPPER_REGISTRY
from clipdense.data.shapes.draw import Rng
from clipdense.data.shapes.pretraining.crops import AnnotatedThing, CropSampler
from clipdense.data.shapes.world import CLASSES

from detectron2.config import CfgNode, configurable


@MAPPER_REGISTRY.register()
class CropCaptionMapper:
    """Turns an annotated scene into captioned crops.

    Args:
        sampler: draws a crop.
        per_image: crops an image.
        is_train: draw other crops every time; in evaluation an image always gives the same ones.
    """

    @configurable
    def __init__(self, *, sampler: CropSampler, per_image: int, is_train: bool) -> None:
        self.sampler, self.per_image, self.is_train = sampler, per_image, is_train

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict[str, Any]:
        """Constructor arguments from ``INPUT.CROP_CAPTION``."""
        keys = cfg.INPUT.CROP_CAPTION
        return {
            "sampler": CropSampler(keys.SIZE, keys.OBJECT_SHARE, keys.WINDOW_SHARE),
            "per_image": keys.PER_IMAGE,
            "is_train": is_train,
        }

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any]:
        """Crops of one image.

        Args:
            dataset_dict: a record of ``shapes_clip_*``: ``file_name``, ``sem_seg_file_name`` (things 0..79,
                grounds from 80), ``annotations`` with ``visible``.

        Returns:
            ``file_name``, ``image_id``, ``crops`` (n, 3, S, S) uint8 RGB, ``captions`` (n strings) and
            ``contents`` (n, 96) uint8 (see `crops.CONTENT_SIZE`).

        Raises:
            KeyError: If a record comes from another kind of dataset.
        """
        for key in ("sem_seg_file_name", "annotations"):
            if key not in dataset_dict:
                raise KeyError(
                    f"{dataset_dict.get('file_name')}: no {key!r}; CropCaptionMapper needs shapes_clip_* data"
                )
        image = read_image(dataset_dict["file_name"], "RGB")
        labels = read_labels(dataset_dict["sem_seg_file_name"])
        is_ground = (labels >= len(CLASSES)) & (labels < 255)
        ground = np.where(is_ground, labels - len(CLASSES), 255).astype(np.uint8)
        things = []
        for annotation in dataset_dict["annotations"]:
            x, y, w, h = annotation["bbox"]
            things.append(
                AnnotatedThing(annotation["category_id"], (x, y, x + w, y + h), annotation["visible"])
            )
        seed = int(torch.randint(2**31, ())) if self.is_train else 0
        rng = Rng(seed, int(dataset_dict["image_id"]))
        crops = [self.sampler(image, ground, things, rng) for _ in range(self.per_image)]
        return {
            "file_name": dataset_dict["file_name"],
            "image_id": dataset_dict["image_id"],
            "crops": torch.from_numpy(np.stack([c.image for c in crops]).transpose(0, 3, 1, 2).copy()),
            "captions": [c.caption for c in crops],
            "contents": torch.from_numpy(np.stack([c.content for c in crops])),
        }
