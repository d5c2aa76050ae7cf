"""Base class of mask classification models with any vocabulary and with masks from any source."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clipdense.clip.vocabulary import Vocabulary
from clipdense.data.proposals import build_mask_source
from clipdense.inference import merge_queries
from clipdense.maskformer.meta_arch import MaskFormer
from clipdense.maskformer.prediction import MaskProposals
from clipdense.open_vocabulary import OpenVocabularyModel, Proposals
from clipdense.regions import LazyMaps

from detectron2.config import CfgNode
from detectron2.structures import ImageList

__all__ = ["OpenVocabularyMaskFormer", "mask_source_from_config", "output_size"]

MASK_LOGIT = 20.0
"""Logit of a pixel inside a mask that does not come from the network."""


class OpenVocabularyMaskFormer(OpenVocabularyModel, MaskFormer):
    """`MaskFormer` whose classes change after it is built, and whose masks may come from elsewhere.

    Attributes:
        mask_source: Where the masks of evaluation come from; None: from the network. Any object with
            `propose_masks` will do: annotations, a file, or another segmentation model. Such masks have no
            query, so only CLIP classifies them.
    """

    mask_source: Proposals | None = None

    def merge(self, scores: Tensor, masks: LazyMaps, sample: dict[str, Any]) -> dict[str, Any]:
        """Merge the classified masks of one image to the enabled outputs. See `merge_queries`."""
        image_size = masks.shape[1:]
        return merge_queries(
            scores,
            masks,
            self.merging,
            image_size=image_size,
            output_size=output_size(sample, image_size),
            things=self.thing_classes(),
            base=self.base_flags(),
        )

    def thing_classes(self) -> frozenset[int]:
        """Return the things of the evaluation vocabulary, or of the dataset if it does not mark them."""
        vocabulary: Vocabulary | None = self.vocabulary
        flags = None if vocabulary is None else vocabulary.thing
        return self.things if flags is None else frozenset(i for i, thing in enumerate(flags) if thing)

    def propose(self, batched_inputs: Sequence[dict[str, Any]]) -> MaskProposals:
        """Predict the masks of a batch, or take those of `mask_source`."""
        if self.mask_source is None:
            return super().propose(batched_inputs)
        images = self.preprocess_image(batched_inputs)
        return MaskProposals(
            mask_logits=self.source_logits(batched_inputs, images),
            padded_size=(images.tensor.shape[-2], images.tensor.shape[-1]),
            image_sizes=[(h, w) for h, w in images.image_sizes],
        )

    def source_logits(self, batched_inputs: Sequence[dict[str, Any]], images: ImageList) -> Tensor:
        """Return the masks of `mask_source` as logits (B, Q, H, W) over the padded images.

        Images with fewer masks than others of the batch get empty ones; there is at least one.
        """
        assert self.mask_source is not None
        proposed = [
            _image_logits(self.mask_source.propose_masks(_described(sample)), size)
            for sample, size in zip(batched_inputs, images.image_sizes, strict=True)
        ]
        shape = max(1, *(len(logits) for logits in proposed)), *images.tensor.shape[-2:]
        stacked = images.tensor.new_full((len(proposed), *shape), -MASK_LOGIT)
        for target, logits in zip(stacked, proposed, strict=True):
            target[: len(logits), : logits.shape[1], : logits.shape[2]] = logits
        return stacked


def mask_source_from_config(cfg: CfgNode) -> Proposals | None:
    """Build the source of masks that ``MODEL.MASK_FORMER.TEST.MASK_SOURCE`` names."""
    source = cfg.MODEL.MASK_FORMER.TEST.MASK_SOURCE
    return build_mask_source(source, cfg.DATASETS.TEST, cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE)


def output_size(sample: dict[str, Any], image_size: tuple[int, int]) -> tuple[int, int]:
    """Return the height and width of the outputs of a sample, by default those of the image."""
    return sample.get("height", image_size[0]), sample.get("width", image_size[1])


def _described(sample: dict[str, Any]) -> dict[str, Any]:
    """Return a sample with the size of its output, as sources of masks expect it."""
    height, width = output_size(sample, (sample["image"].shape[-2], sample["image"].shape[-1]))
    return sample | {"height": height, "width": width}


def _image_logits(masks: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize binary masks (Q, H, W) to the image and convert them to logits (Q, h, w)."""
    if not len(masks):
        return torch.empty(0, *size)
    inside = F.interpolate(masks[:, None].float(), size=tuple(size), mode="bilinear", align_corners=False)
    return (2 * inside[:, 0] - 1) * MASK_LOGIT
