"""Mask-noun pairs from captions (OVSeg, Liang et al., CVPR 2023, section 3.2; the paper's code for it has
not been released).

An image's mask proposals are embedded by CLIP as OVSeg embeds them, the nouns of its captions by the prompt
templates, and every noun takes the proposal whose embedding is closest to its own. No threshold, no
suppression, no smallest area are published; they are here as filters, off by default.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pycocotools.mask as mask_util
import torch
from torch import Tensor

from clipdense.clip.text import TextBank
from clipdense.clip.tokenizer import token_counts
from clipdense.data.datasets.layouts import load_json
from clipdense.data.image import read_labels
from clipdense.data.mappers import map_image
from clipdense.data.mask_pairs import labelled_segments
from clipdense.regions.encoder import RegionEncoder, cosine_logits
from clipdense.systems.two_stage.meta_arch import OVSeg

__all__ = [
    "FileProposals",
    "Filters",
    "GroundTruthProposals",
    "MaskMiner",
    "ModelProposals",
    "NounEmbedder",
    "Proposals",
    "assign",
    "ground_truth_masks",
]

Record = dict[str, Any]
RLE = dict[str, Any]
Picture = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Filters:
    """What is not taken; the defaults take everything.

    Attributes:
        min_area: proposals with fewer pixels are not considered.
        min_score: least cosine of a pair, -1 .. 1.
        margin: by which a pair's cosine must exceed that of the noun with the second best proposal.
    """

    min_area: int = 0
    min_score: float = -1.0
    margin: float = 0.0


class Proposals(Protocol):
    """Where the masks of an image come from."""

    def __call__(self, record: Record, image: Picture) -> Tensor:
        """Masks (Q, H, W) bool of an image (H, W, 3) RGB."""
        ...


class ModelProposals:
    """The masks of all queries of an OVSeg model, at the image's size, above its crop rule's threshold."""

    def __init__(self, model: OVSeg, mapper: Any) -> None:
        """
        Args:
            mapper: of evaluation, see `clipdense.data.mappers.build_mapper`.
        """
        self.model, self.mapper = model, mapper

    def __call__(self, record: Record, image: Picture) -> Tensor:
        """See `Proposals`."""
        sample = map_image(self.mapper, image if self.mapper.image_format == "RGB" else image[:, :, ::-1])
        return self.model.propose_masks({**sample, "height": image.shape[0], "width": image.shape[1]})


class GroundTruthProposals:
    """The annotated segments of a data set: of panoptic segmentation, else instances, else one a class."""

    def __init__(self, records: Iterable[Record], ignore_label: int = 255) -> None:
        """
        Args:
            ignore_label: void in semantic maps.
        """
        self._ignore_label = ignore_label
        self._records = {os.path.abspath(record["file_name"]): record for record in records}

    def __call__(self, record: Record, image: Picture) -> Tensor:
        """See `Proposals`; none for an image that the data set does not have."""
        known = self._records.get(record["file_name"])
        if known is None:
            return _decode([], image)
        found = ground_truth_masks(known, image.shape[:2], self._ignore_label)
        return _decode([mask for _, mask in found], image)


class FileProposals:
    """Masks that were made before: a json list of ``image_id`` and ``segmentation`` (COCO RLE), as COCO's
    results are."""

    def __init__(self, path: str | Path) -> None:
        """
        Raises:
            FileNotFoundError: no such file.
            ValueError: not such a list.
        """
        self._masks: dict[Any, list[RLE]] = defaultdict(list)
        try:
            for item in load_json(path):
                self._masks[item["image_id"]].append(_encoded(item["segmentation"], None))
        except (TypeError, KeyError) as error:
            raise ValueError(
                f"{path}: not a json list of image_id and segmentation (COCO RLE) ({error!r})"
            ) from error

    def __call__(self, record: Record, image: Picture) -> Tensor:
        """See `Proposals`; none for an image that the file does not have."""
        masks = self._masks.get(record["image_id"], [])
        for mask in masks:
            if tuple(mask["size"]) != image.shape[:2]:
                raise ValueError(
                    f"{record['file_name']} has {image.shape[0]} x {image.shape[1]} pixels, its proposals "
                    f"have {mask['size'][0]} x {mask['size'][1]}"
                )
        return _decode(masks, image)


def ground_truth_masks(
    record: Record, size: tuple[int, ...], ignore_label: int = 255
) -> list[tuple[int, RLE]]:
    """The annotated segments of a dataset dict, as (contiguous class, COCO RLE).

    Args:
        size: height and width of the image.
        ignore_label: void in semantic maps.

    Returns:
        Panoptic segments where there are any; else instances; else one segment for each class of a semantic
        map. Crowds are left out.
    """
    if "annotations" in record and "pan_seg_file_name" not in record:
        return [
            (annotation["category_id"], _encoded(annotation["segmentation"], size))
            for annotation in record["annotations"]
            if annotation.get("segmentation") and not annotation.get("iscrowd")
        ]
    segments = labelled_segments(record, ignore_label)
    labels = read_labels(segments.file_name)
    pairs = zip(segments.classes, segments.labels, strict=True)
    return [(label, _mask(labels == value)) for label, value in pairs]


class NounEmbedder:
    """Text embeddings of nouns, each encoded once and on its own: so a noun has the same embedding, bit by
    bit, whichever others a run meets.
    """

    def __init__(self, bank: TextBank) -> None:
        """
        Args:
            bank: of the CLIP that sees the crops; it should keep nothing on disk, where other programs'
                batches round otherwise.
        """
        self._bank = bank
        self._known: dict[str, Tensor | None] = {}

    def __call__(self, noun: str) -> Tensor | None:
        """(D,) of unit length; None for a noun that is too long for the text tower."""
        if noun not in self._known:
            self._known[noun] = self._bank.embed_names([noun])[0] if self._fits(noun) else None
        return self._known[noun]

    def _fits(self, noun: str) -> bool:
        clip, templates = self._bank.clip, self._bank.templates
        assert clip.text is not None
        limit = clip.text.context_length - (self._bank.prompts.length if self._bank.prompts else 0)
        return max(token_counts(clip.tokenizer, templates.fill(noun))) <= limit


class MaskMiner:
    """Pairs of masks and nouns of an image.

    Attributes:
        proposals: where its masks come from.
        encoder: CLIP's embeddings of masks.
        embed: CLIP's embeddings of nouns.
    """

    def __init__(
        self,
        proposals: Proposals,
        encoder: RegionEncoder,
        embed: NounEmbedder,
        filters: Filters | None = None,
    ) -> None:
        """
        Args:
            filters: default: none.
        """
        self.proposals, self.encoder, self.embed = proposals, encoder, embed
        self.filters = filters or Filters()

    @torch.no_grad()
    def __call__(self, record: Record, image: Picture, nouns: Mapping[str, str]) -> list[Record]:
        """Pairs of one image, at most one a noun, in the order of the nouns.

        Args:
            record: ``file_name`` and ``image_id``.
            image: (H, W, 3) RGB.
            nouns: noun -> a caption that has it.

        Returns:
            Records as `clipdense.data.mask_pairs` describes them.
        """
        rows = {noun: row for noun in nouns if (row := self.embed(noun)) is not None}
        if not rows:
            return []
        masks = self.proposals(record, image)
        masks = masks[masks.flatten(1).sum(1) >= max(1, self.filters.min_area)]
        if not len(masks):
            return []
        text = torch.stack(list(rows.values()))
        pixels = torch.from_numpy(image.transpose(2, 0, 1).copy()).to(text.device)
        embeddings, valid = self.encoder(pixels, masks.to(text.device))
        masks = masks[valid.to(masks.device)]
        height, width = image.shape[:2]
        rles: dict[int, RLE] = {}
        pairs = []
        for noun, best in zip(rows, assign(embeddings, text, self.filters), strict=True):
            if best is None:
                continue
            index, score = best
            if index not in rles:
                rles[index] = _mask(masks[index].cpu().numpy())
            pairs.append(
                {
                    "file_name": record["file_name"],
                    "height": height,
                    "width": width,
                    "segmentation": rles[index],
                    "noun": noun,
                    "score": round(score, 5),
                    "image_id": record["image_id"],
                    "caption": nouns[noun],
                }
            )
        return pairs


def assign(
    embeddings: Tensor, text: Tensor, filters: Filters | None = None
) -> list[tuple[int, float] | None]:
    """The best mask of every noun.

    Args:
        embeddings: (V, D) of masks.
        text: (N, D) of nouns.
        filters: ``min_score`` and ``margin``; equal scores, as those of equal masks, are no second best.

    Returns:
        For every noun the mask, the first among equals, and their cosine; None where a filter says no.
    """
    filters = filters or Filters()
    scores = cosine_logits(embeddings, text, 1.0)
    if not len(scores):
        return [None] * scores.shape[1]
    best = scores.amax(0)
    second = scores.masked_fill(scores == best, -torch.inf).amax(0)
    kept = (best >= filters.min_score) & (best - second >= filters.margin)
    index = (scores == best).byte().argmax(0)
    return [
        (i, score) if keep else None
        for i, score, keep in zip(index.tolist(), best.tolist(), kept.tolist(), strict=True)
    ]


def _decode(masks: Sequence[RLE], image: Picture) -> Tensor:
    if not masks:
        return torch.zeros(0, *image.shape[:2], dtype=torch.bool)
    decoded = mask_util.decode(list(masks))  # (H, W, Q)
    return torch.from_numpy(np.ascontiguousarray(decoded.transpose(2, 0, 1))).bool()


def _mask(mask: npt.NDArray[np.bool_]) -> RLE:
    """COCO's compressed RLE, as text, of a mask (H, W)."""
    return _encoded(mask_util.encode(np.asfortranarray(mask, np.uint8)), None)


def _encoded(segmentation: Any, size: tuple[int, ...] | None) -> RLE:
    """Any segmentation of COCO's (polygons, counts in full or compressed) as compressed RLE."""
    if isinstance(segmentation, list):
        if size is None:
            raise TypeError("polygons, not run lengths")
        segmentation = mask_util.merge(mask_util.frPyObjects(segmentation, size[0], size[1]))
    elif isinstance(segmentation["counts"], list):
        segmentation = mask_util.frPyObjects(segmentation, *segmentation["size"])
    counts = segmentation["counts"]
    return {
        "size": [int(side) for side in segmentation["size"]],
        "counts": counts.decode("ascii") if isinstance(counts, bytes) else counts,
    }
