"""Mask-noun pairs from captions (OVSeg, Liang et al., CVPR 2023, section 3.2; the paper's code for it is not
released).

CLIP embeds an image's mask proposals as OVSeg does, and the nouns of its captions in prompt templates. Every
noun is paired with the proposal of highest cosine similarity. The paper publishes no threshold, suppression
or minimum area; they are optional filters here, off by default.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from clipdense.clip.text import TextBank
from clipdense.clip.tokenizer import token_counts
from clipdense.data.mappers import map_image
from clipdense.data.proposals import RLE, encode_mask
from clipdense.open_vocabulary.protocols import Proposals
from clipdense.regions.encoder import cosine_logits

__all__ = ["Filters", "MaskMiner", "NounEmbedder", "assign"]

Record = dict[str, Any]


@dataclass(frozen=True)
class Filters:
    """Thresholds of pairs; the defaults keep every pair.

    Attributes:
        min_area: smallest area of a proposal, in pixels.
        min_score: smallest cosine similarity of a pair, -1 to 1.
        margin: smallest difference to the second-best proposal of the same noun.
    """

    min_area: int = 0
    min_score: float = -1.0
    margin: float = 0.0


class NounEmbedder:
    """Text embeddings of nouns, each encoded once and alone.

    A noun thus has the same embedding, bit by bit, whichever other nouns a run contains.

    Args:
        bank: of the CLIP that embeds the crops. It should have no cache on disk, as other programs encode
            names in other batches, with other rounding.
    """

    def __init__(self, bank: TextBank) -> None:
        self._bank = bank
        self._known: dict[str, Tensor | None] = {}

    def __call__(self, noun: str) -> Tensor | None:
        """Embed a noun: (D,) of unit length; None if it is too long for the text tower."""
        if noun not in self._known:
            self._known[noun] = self._bank.embed_names([noun])[0] if self._fits(noun) else None
        return self._known[noun]

    def _fits(self, noun: str) -> bool:
        clip, templates = self._bank.clip, self._bank.templates
        assert clip.text is not None
        limit = clip.text.context_length - (self._bank.prompts.length if self._bank.prompts else 0)
        return max(token_counts(clip.tokenizer, templates.fill(noun))) <= limit


class MaskMiner:
    """Finds the mask-noun pairs of an image.

    Attributes:
        proposals: source of masks.
        encoder: from an image (3, H, W) RGB uint8 and masks (Q, H, W) to embeddings (V, D) of the valid masks
            and a flag (Q,) that says which these are; a `RegionEncoder`, for example.
        embed: from a noun to its embedding (D,); None for a noun that cannot be encoded.
        filters: thresholds of pairs.
        mapper: evaluation mapper that prepares images for ``proposals``; None for proposals that do not look
            at the image.
    """

    def __init__(
        self,
        proposals: Proposals,
        encoder: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
        embed: Callable[[str], Tensor | None],
        filters: Filters | None = None,
        mapper: Any = None,
    ) -> None:
        self.proposals, self.encoder, self.embed = proposals, encoder, embed
        self.filters = filters or Filters()
        self.mapper = mapper

    @torch.no_grad()
    def __call__(
        self, record: Record, image: npt.NDArray[np.uint8], nouns: Mapping[str, str]
    ) -> list[Record]:
        """Find the pairs of one image: at most one for each noun, in the order of the nouns.

        Args:
            record: with ``file_name`` (absolute) and ``image_id``.
            image: (H, W, 3) RGB.
            nouns: noun -> a caption that contains it.

        Returns:
            Pairs, see `clipdense.data.mask_pairs.read_pairs`.
        """
        rows = {noun: row for noun in nouns if (row := self.embed(noun)) is not None}
        if not rows:
            return []
        masks = self.proposals.propose_masks(self._sample(record, image))
        masks = masks[masks.flatten(1).sum(1) >= max(1, self.filters.min_area)]
        if not len(masks):
            return []
        text = torch.stack(list(rows.values()))
        pixels = torch.from_numpy(image.transpose(2, 0, 1).copy()).to(text.device)
        embeddings, valid = self.encoder(pixels, masks.to(text.device))
        masks = masks[valid.to(masks.device)]
        height, width = image.shape[:2]
        codes: dict[int, RLE] = {}
        pairs = []
        for noun, best in zip(rows, assign(embeddings, text, self.filters), strict=True):
            if best is None:
                continue
            index, score = best
            if index not in codes:
                codes[index] = encode_mask(masks[index].cpu().numpy())
            pairs.append(
                {
                    "file_name": record["file_name"],
                    "height": height,
                    "width": width,
                    "segmentation": codes[index],
                    "noun": noun,
                    "score": round(score, 5),
                    "image_id": record["image_id"],
                    "caption": nouns[noun],
                }
            )
        return pairs

    def _sample(self, record: Record, image: npt.NDArray[np.uint8]) -> Record:
        """Build the input of `Proposals.propose_masks`, with masks requested at the size of the image."""
        sample: Record = {key: record[key] for key in ("file_name", "image_id")}
        if self.mapper is None:
            return sample | {"height": image.shape[0], "width": image.shape[1]}
        return sample | map_image(
            self.mapper, image if self.mapper.image_format == "RGB" else image[:, :, ::-1]
        )


def assign(
    embeddings: Tensor, text: Tensor, filters: Filters | None = None
) -> list[tuple[int, float] | None]:
    """Assign the mask of highest cosine similarity to every noun.

    Args:
        embeddings: (V, D) of masks.
        text: (N, D) of nouns.
        filters: ``min_score`` and ``margin``. Masks with the best score, such as equal masks, do not count as
            second-best.

    Returns:
        For every noun the index of the mask, the first among equals, and their cosine; None if a filter
        rejects the pair.
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
