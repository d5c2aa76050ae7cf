"""Grounding of the noun phrases of captions in mask queries."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from clipdense.clip.model import ClipModel
from clipdense.clip.text import TextBank
from clipdense.maskformer import MaskPrediction
from clipdense.systems.mask_pooling.queries import SynonymClassifier

__all__ = ["GroundingLoss", "grounding_loss"]


def grounding_loss(
    queries: Tensor, words: Tensor, valid: Tensor, scale: Tensor | float, weight: float = 1.0
) -> Tensor:
    """Compute ODISE's caption loss: images and captions of a batch find each other through their masks.

    With s = scale cos(query, word), a word's score in an image is the sum over the queries of softmax(s) s,
    and a caption's score M the mean over its words. The loss is the mean of the cross-entropies of the rows
    (an image finds its caption) and of the columns (a caption finds its image) of M. Captions without a noun
    are no targets, but stay in the denominators of both softmaxes, as in the published code.

    Args:
        queries: (B, Q, D) embeddings of the masks of each image.
        words: (B, K, D) embeddings of the noun phrases of each caption, the i-th of which describes image i.
        valid: (B,) bool, the captions with a noun.
        scale: Inverse temperature.
        weight: Factor of the loss.

    Returns:
        A scalar; 0 if no caption has a noun.

    Source: ODISE (Xu et al., CVPR 2023, section 3.3, image caption supervision; released code).
    """
    s = scale * torch.einsum("bqd,akd->bakq", F.normalize(queries, dim=-1), F.normalize(words, dim=-1))
    matrix = (s.softmax(-1) * s).sum(-1).mean(-1)  # (images, captions)
    target = torch.arange(len(matrix), device=matrix.device)
    kept = valid.to(matrix.dtype)
    images = (F.cross_entropy(matrix, target, reduction="none") * kept).sum() / kept.sum().clamp(min=1)
    captions = (F.cross_entropy(matrix.T, target, reduction="none") * kept).sum() / len(matrix)
    return weight * (images + captions) / 2


class GroundingLoss:
    """Supervision of queries by the noun phrases of captions; see `grounding_loss`."""

    def __init__(
        self,
        clip: ClipModel,
        *,
        weight: float = 2.0,
        num_phrases: int = 8,
        template: str = "a photo of a {}.",
    ) -> None:
        """
        Args:
            clip: CLIP whose text encoder embeds the phrases.
            weight: Factor of the loss.
            num_phrases: Number of phrases of a caption, drawn with replacement, so that all captions have as
                many.
            template: Sentence around a phrase.
        """
        self.bank = TextBank(clip, template, cache_dir=None, progress=False)
        self.weight, self.num_phrases = weight, num_phrases

    def __call__(
        self, prediction: MaskPrediction, phrases: Sequence[Sequence[str]], classifier: SynonymClassifier
    ) -> dict[str, Tensor]:
        """Compute the loss of the last layer and of the earlier ones.

        Args:
            prediction: With query embeddings (B, Q, D).
            phrases: Noun phrases of one caption of each image; empty for a caption without a noun.
            classifier: Has the inverse temperature and the projection of text embeddings.

        Returns:
            ``loss_grounding``, and with the suffix ``_i`` the loss of layer i.
        """
        drawn = [self._draw(names) for names in phrases]
        words = self.bank.embed_names([name for names in drawn for name in names])
        words = classifier.project(words.to(classifier.void.device)).unflatten(0, (-1, self.num_phrases))
        valid = torch.tensor([bool(names) for names in phrases], device=words.device)
        layers = {"": prediction, **{f"_{i}": layer for i, layer in enumerate(prediction.aux)}}
        return {
            f"loss_grounding{suffix}": grounding_loss(
                layer.require_query_embeddings(), words, valid, classifier.scale, self.weight
            )
            for suffix, layer in layers.items()
        }

    def _draw(self, names: Sequence[str]) -> list[str]:
        if not names:
            return ["thing"] * self.num_phrases  # has no influence on the loss of its own caption
        return [names[i] for i in torch.randint(len(names), (self.num_phrases,)).tolist()]
