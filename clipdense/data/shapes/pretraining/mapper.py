"""Captioned crops from datasets of the `shapes` world."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from clipdense.data.image import read_image, read_labels
from clipdense.data.mappers import MAPPER_REGISTRY, DetectionMapper
from clipdense.data.shapes.draw import Rng
from clipdense.data.shapes.pretraining.crops import AnnotatedThing, CropSampler
from clipdense.data.shapes.world import CLASSES, GROUNDS
from clipdense.engine.options import ConfigError

from detectron2.config import CfgNode, configurable

_GROUND_OF_LABEL = np.full(256, 255, np.uint8)
_GROUND_OF_LABEL[len(CLASSES) : len(CLASSES) + len(GROUNDS)] = np.arange(len(GROUNDS))


@dataclass(frozen=True)
class CropView:
    """A kind of view of a scene.

    Attributes:
        sampler: sampler of the crops.
        per_image: number of crops per image.
        share: share of the images that use this view, relative to the shares of the other views.
    """

    sampler: CropSampler
    per_image: int
    share: float

    @classmethod
    def parse(cls, view: dict[str, Any]) -> "CropView":
        """Build a view from an entry of ``INPUT.CROP_CAPTION.VIEWS``.

        Args:
            view: entry with the keys SIZE, PER_IMAGE, SHARE, OBJECTS and WINDOWS.

        Returns:
            The view.

        Raises:
            ConfigError: If a key is missing or unknown.
        """
        if set(view) != _VIEW_KEYS:
            raise ConfigError(
                f"INPUT.CROP_CAPTION.VIEWS: {view} must have the keys {', '.join(sorted(_VIEW_KEYS))}"
            )
        sampler = CropSampler(view["SIZE"], view["OBJECTS"], view["WINDOWS"])
        return cls(sampler, view["PER_IMAGE"], view["SHARE"])


_VIEW_KEYS = {"SIZE", "PER_IMAGE", "SHARE", "OBJECTS", "WINDOWS"}


@MAPPER_REGISTRY.register()
class CropCaptionMapper:
    """Mapper from an annotated scene to captioned crops.

    Args:
        views: kinds of views; each image uses one of them.
        is_train: choose a random view and new crops at each call. In evaluation, an image always gives the
            same crops of the first view.
    """

    @configurable
    def __init__(self, *, views: Sequence[CropView], is_train: bool) -> None:
        self.views, self.is_train = list(views), is_train
        self._shares = torch.tensor([view.share for view in self.views], dtype=torch.float32)

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict[str, Any]:
        """Return the constructor arguments from ``INPUT.CROP_CAPTION``."""
        return {"views": [CropView.parse(v) for v in cfg.INPUT.CROP_CAPTION.VIEWS], "is_train": is_train}

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any]:
        """Draw the crops of one image.

        Args:
            dataset_dict: a record of ``shapes_clip_*``: ``file_name``, ``sem_seg_file_name`` (things 0..79,
                grounds from 80), ``annotations`` with ``visible``.

        Returns:
            ``file_name``, ``image_id``, ``crops`` (n, 3, S, S) uint8 RGB, ``captions`` and ``paraphrases``
            (n strings each) and ``contents`` (n, 96) uint8 (see `crops.CONTENT_SIZE`).

        Raises:
            KeyError: If the record comes from another kind of dataset.
        """
        for key in ("sem_seg_file_name", "annotations"):
            if key not in dataset_dict:
                raise KeyError(
                    f"{dataset_dict.get('file_name')}: no {key!r}; CropCaptionMapper needs shapes_clip_* data"
                )
        image = read_image(dataset_dict["file_name"], "RGB")
        ground = _GROUND_OF_LABEL[read_labels(dataset_dict["sem_seg_file_name"])]
        things = []
        for annotation in dataset_dict["annotations"]:
            x, y, w, h = annotation["bbox"]
            things.append(
                AnnotatedThing(annotation["category_id"], (x, y, x + w, y + h), annotation["visible"])
            )
        seed = int(torch.randint(2**31, ())) if self.is_train else 0
        rng = Rng(seed, int(dataset_dict["image_id"]))
        view = self.views[int(torch.multinomial(self._shares, 1)) if self.is_train else 0]
        crops = [view.sampler(image, ground, things, rng) for _ in range(view.per_image)]
        return {
            "file_name": dataset_dict["file_name"],
            "image_id": dataset_dict["image_id"],
            "crops": torch.from_numpy(np.stack([c.image for c in crops]).transpose(0, 3, 1, 2).copy()),
            "captions": [c.caption for c in crops],
            "paraphrases": [c.paraphrase for c in crops],
            "contents": torch.from_numpy(np.stack([c.content for c in crops])),
        }


@MAPPER_REGISTRY.register()
class CropPairMapper(CropCaptionMapper):
    """Mapper from an annotated scene to one captioned crop: image-text pairs as `CaptionMapper` gives them.

    A caption of a whole scene names things that a crop of it lacks; these captions describe their crops. In
    evaluation it is `DetectionMapper`.

    Args:
        views: see `CropCaptionMapper`; only the first crop of a view is used.
        is_train: whether crops are drawn.
        test_mapper: mapper of evaluation.
    """

    @configurable
    def __init__(
        self, *, views: Sequence[CropView], is_train: bool, test_mapper: DetectionMapper | None = None
    ) -> None:
        super().__init__(views=views, is_train=is_train)
        self.test_mapper = test_mapper

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict[str, Any]:
        """Return the constructor arguments from ``INPUT.CROP_CAPTION``."""
        test_mapper = None if is_train else DetectionMapper(cfg, False)
        return {**super().from_config(cfg, is_train), "test_mapper": test_mapper}

    def __call__(self, dataset_dict: dict[str, Any]) -> Any:
        """Draw a crop of one image.

        Args:
            dataset_dict: see `CropCaptionMapper`.

        Returns:
            In training ``file_name``, ``image`` (3, S, S) uint8 RGB and ``caption``.
        """
        if self.test_mapper is not None:
            return self.test_mapper(dataset_dict)
        crops = super().__call__(dataset_dict)
        return {
            "file_name": crops["file_name"],
            "image": crops["crops"][0],
            "caption": crops["captions"][0],
        }
