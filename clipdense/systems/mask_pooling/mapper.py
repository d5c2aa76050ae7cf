"""Mapper of segmentation with the noun phrases of captions."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from clipdense.data.captions import captioned_images
from clipdense.data.mappers import MAPPER_REGISTRY
from clipdense.data.nouns import NounFinder
from clipdense.maskformer.mapper import SegmentationMapper

from detectron2.config import CfgNode, configurable

__all__ = ["CaptionedSegmentationMapper"]

ALL_CAPTIONS = 1_000_000


@MAPPER_REGISTRY.register()
class CaptionedSegmentationMapper(SegmentationMapper):
    """`SegmentationMapper` that in training adds ``phrases``: the noun phrases of one random caption of the
    image (ODISE, Xu et al., CVPR 2023, section 3.3)."""

    @configurable
    def __init__(self, is_train: bool, *, captions: str = "", **kwargs: Any) -> None:
        """
        Args:
            is_train: See `DetectionMapper`.
            captions: A registered dataset with captions, or a file of COCO captions, whose images are found
                by their file names; "": the captions in the dataset's own records.
            kwargs: Arguments of `DetectionMapper`.
        """
        super().__init__(is_train, **kwargs)
        self.captions = captions

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict[str, Any]:
        """Read the constructor arguments from ``INPUT.*``."""
        return super().from_config(cfg, is_train) | {"captions": cfg.INPUT.CAPTIONS}

    def __call__(self, record: dict[str, Any]) -> dict[str, Any] | None:
        """Map a record; see `DetectionMapper`.

        Raises:
            ValueError: If an image has no caption; names it.
        """
        sample: dict[str, Any] | None = super().__call__(record)
        if sample is None or not self.is_train:
            return sample
        captions = self._captions_of(record)
        if not captions:
            raise ValueError(
                f"{record['file_name']} has no caption: set INPUT.CAPTIONS to a dataset or file that has it"
            )
        sample["phrases"] = self._nouns([random.choice(captions)])[0]
        return sample

    def _captions_of(self, record: Mapping[str, Any]) -> Sequence[str]:
        if not self.captions:
            found: Sequence[str] = record.get("captions", ())
            return found
        return self._by_file.get(Path(record["file_name"]).name, ())

    @cached_property
    def _by_file(self) -> dict[str, list[str]]:
        records = captioned_images(self.captions, captions=ALL_CAPTIONS)
        return {Path(record["file_name"]).name: record["captions"] for record in records}

    @cached_property
    def _nouns(self) -> NounFinder:
        return NounFinder()
