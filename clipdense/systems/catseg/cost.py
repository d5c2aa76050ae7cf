"""Cost volume of an image and class names, and its aggregation to logits (CAT-Seg, Cho et al., CVPR 2024)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipdense.systems.catseg.aggregation import AggregationLayer, in_chunks
from clipdense.systems.catseg.decoder import CostDecoder

__all__ = [
    "ABSENT_LOGIT",
    "AggregationSettings",
    "CostAggregator",
    "CostLogits",
    "class_chunk",
    "cost_volume",
    "keep_top_classes",
    "scatter_classes",
]

ABSENT_LOGIT = -100.0
"""Logit of classes that are not aggregated."""


@dataclass(frozen=True)
class AggregationSettings:
    """Settings of one forward of the aggregator, which may differ between training and evaluation.

    Attributes:
        pooling: height and width of the average pooling before the class attention.
        max_maps: number of maps (images x classes) that are processed at a time, without gradients; 0: all.
        rejection_topk: category early rejection keeps the classes that are among this many best at any
            position; 0: no rejection.
    """

    pooling: tuple[int, int] = (1, 1)
    max_maps: int = 0
    rejection_topk: int = 0


@dataclass
class CostLogits:
    """Result of the aggregator.

    Attributes:
        logits: (B, T, H, W); `ABSENT_LOGIT` for classes that were not selected, or rejected.
        rejection: logits (B, T, h, w) of each rejection head, in the order of the stages; empty without
            heads.
    """

    logits: Tensor
    rejection: list[Tensor] = field(default_factory=list)

    @classmethod
    def concatenate(cls, images: Sequence[CostLogits]) -> CostLogits:
        """Concatenate the results of several images."""
        rejection = zip(*(image.rejection for image in images), strict=True)
        return cls(torch.cat([image.logits for image in images]), [torch.cat(maps) for maps in rejection])


def cost_volume(dense: Tensor, text: Tensor) -> Tensor:
    """Compute the cosines of image positions and prompts.

    Args:
        dense: dense image embeddings (B, D, h, w).
        text: prompt embeddings (B, T, P, D).

    Returns:
        (B, T, P, h, w).
    """
    dense, text = F.normalize(dense, dim=1), F.normalize(text, dim=-1)
    volume = text.flatten(1, 2) @ dense.flatten(2)
    return volume.unflatten(1, text.shape[1:3]).unflatten(-1, dense.shape[2:])


def keep_top_classes(scores: Tensor, count: int) -> Tensor:
    """Find the classes that are among the best at any position (SED, Xie et al., CVPR 2024, section 3.3).

    Args:
        scores: (T, h, w).
        count: number of classes that each position keeps.

    Returns:
        (T,) bool.
    """
    best = scores.flatten(1).topk(min(count, len(scores)), dim=0).indices
    kept = torch.zeros(len(scores), dtype=torch.bool, device=scores.device)
    return kept.index_fill_(0, best.flatten(), True)


class CostAggregator(nn.Module):
    """From dense image embeddings and text embeddings to one logit map per class.

    1. The cost volume (cosines of positions and prompts) is embedded by a 7 x 7 convolution.
    2. Layers aggregate the embeddings over space, guided by the image, and over classes, guided by the text.
    3. A decoder upsamples the map of each class to 4 times the size, guided by early features.

    Above ``max_classes`` classes, only the best of each image are aggregated.
    """

    def __init__(
        self,
        embed_dim: int,
        *,
        prompts: int = 1,
        hidden_dim: int = 128,
        layers: int = 2,
        heads: int = 4,
        window: int = 12,
        max_classes: int = 256,
        image_guidance_dim: int = 128,
        text_guidance_dim: int = 128,
        guidance_dims: Sequence[int] = (256, 128),
        decoder_guidance_dims: Sequence[int] = (32, 16),
        decoder_dims: Sequence[int] = (64, 32),
        rejection_heads: bool = False,
    ) -> None:
        """
        Args:
            embed_dim: D of the joint space.
            prompts: number P of prompts per class.
            hidden_dim: C of the cost embeddings.
            layers: number of aggregation layers.
            heads: heads of all attentions.
            window: side of the attention windows in positions.
            max_classes: T above which classes are selected, and length that shorter class sequences are
                filled up to with learned tokens.
            image_guidance_dim: channels of the projected image embeddings.
            text_guidance_dim: channels of the projected text embeddings.
            guidance_dims: channels of the early features at 2 and 4 times the size of the dense map.
            decoder_guidance_dims: channels of their projections.
            decoder_dims: channels after each stage of the decoder.
            rejection_heads: add a head before each layer and before the decoder that scores classes for
                category early rejection. Otherwise the cost volume scores them, before the first layer only.

        Raises:
            ValueError: If the heads do not divide ``hidden_dim``.
        """
        super().__init__()
        if hidden_dim % heads:
            raise ValueError(
                f"MODEL.CAT_SEG.HEADS {heads} does not divide MODEL.CAT_SEG.HIDDEN_DIM {hidden_dim}"
            )
        self.max_classes = max_classes
        self.cost_embedding = nn.Conv2d(prompts, hidden_dim, 7, padding=3)
        self.image_guidance = nn.Conv2d(embed_dim, image_guidance_dim, 3, padding=1)
        self.text_guidance = nn.Linear(embed_dim, text_guidance_dim)
        self.decoder_guidance = nn.ModuleList(
            nn.Conv2d(width, projected, 3, padding=1)
            for width, projected in zip(guidance_dims, decoder_guidance_dims, strict=True)
        )
        sizes = (hidden_dim, image_guidance_dim, text_guidance_dim, heads, window, max_classes)
        self.layers = nn.ModuleList(AggregationLayer(*sizes) for _ in range(layers))
        self.decoder = CostDecoder(hidden_dim, decoder_guidance_dims, decoder_dims)
        self.rejection_heads = nn.ModuleList(
            nn.Conv2d(hidden_dim, 1, 3, padding=1) for _ in range(layers + 1 if rejection_heads else 0)
        )

    def forward(
        self,
        dense: Tensor,
        text: Tensor,
        guidance: Sequence[Tensor],
        settings: AggregationSettings | None = None,
    ) -> CostLogits:
        """Aggregate the cost volume of each image.

        Args:
            dense: dense image embeddings (B, D, h, w), not normalised.
            text: prompt embeddings (T, P, D), or (B, T, P, D) if they differ between images.
            guidance: early features at 2 and 4 times the size: (B, G_1, 2 h, 2 w), (B, G_2, 4 h, 4 w).
            settings: default: no pooling, everything at once, no rejection.
        """
        settings = settings or AggregationSettings()
        text = text.expand(dense.shape[0], *text.shape[-3:])
        guides = [F.relu(layer(map_)) for layer, map_ in zip(self.decoder_guidance, guidance, strict=True)]
        maps = F.relu(self.image_guidance(dense)).permute(0, 2, 3, 1)
        if not settings.rejection_topk:
            index = self.select_classes(dense, text, settings)
            return self._aggregate(dense, text, index, maps, guides, settings)
        images = []
        for b in range(len(dense)):  # images keep different numbers of classes
            one = slice(b, b + 1)
            index = self.select_classes(dense[one], text[one], settings)
            parts = (dense[one], text[one], index, maps[one], [guide[one] for guide in guides])
            images.append(self._aggregate(*parts, settings))
        return CostLogits.concatenate(images)

    def select_classes(self, dense: Tensor, text: Tensor, settings: AggregationSettings) -> Tensor:
        """Select the classes that are aggregated, by their best cosine over positions and prompts.

        Returns:
            (B, T') indices: all classes if they are at most ``max_classes`` and there is no rejection by the
            cost volume. B is 1 with such a rejection.
        """
        batch, classes = text.shape[:2]
        reject = bool(settings.rejection_topk) and not self.rejection_heads
        if classes <= self.max_classes and not reject:
            return torch.arange(classes, device=dense.device).expand(batch, -1)
        with torch.no_grad():
            chunk = class_chunk(batch, settings)
            costs = in_chunks(lambda part: cost_volume(dense, part).amax(2), text, 1, chunk)  # (B, T, h, w)
            index = costs.flatten(2).amax(2).topk(min(classes, self.max_classes), dim=1).indices
            if reject:
                kept = keep_top_classes(costs[0, index[0]], settings.rejection_topk)
                index = index[:, kept]
        return index

    def embed_cost(self, dense: Tensor, text: Tensor, class_chunk: int = 0) -> Tensor:
        """Embed the cost volume of images (B, D, h, w) and prompts (B, T, P, D) as (B, T, h, w, C)."""

        def embed(part: Tensor) -> Tensor:
            volume = cost_volume(dense, part)
            embedded = self.cost_embedding(volume.flatten(0, 1)).permute(0, 2, 3, 1)
            return embedded.contiguous().unflatten(0, volume.shape[:2])

        return in_chunks(embed, text, 1, class_chunk)

    def guide_text(self, text: Tensor) -> Tensor:
        """Project the mean prompt of each class: (B, T, P, D) to (B, T, G)."""
        return F.relu(self.text_guidance(F.normalize(text.mean(2), dim=-1)))

    def _aggregate(
        self,
        dense: Tensor,
        text: Tensor,
        index: Tensor,
        image_guidance: Tensor,
        guides: Sequence[Tensor],
        settings: AggregationSettings,
    ) -> CostLogits:
        """Aggregate the classes of ``index`` (B, T'); see `forward`."""
        batch, classes = text.shape[:2]
        if index.shape[1] < classes:
            text = text.gather(1, index[:, :, None, None].expand(-1, -1, *text.shape[2:]))
        chunk = class_chunk(batch, settings)
        x, text_guidance = self.embed_cost(dense, text, chunk), self.guide_text(text)
        rejection: list[Tensor] = []
        for stage in range(len(self.layers) + 1):
            if self.rejection_heads:
                scores = self._rejection_scores(x, stage)
                rejection.append(scatter_classes(scores, index, classes))
                if settings.rejection_topk:
                    kept = keep_top_classes(scores[0], settings.rejection_topk)
                    x, text_guidance, index = x[:, kept], text_guidance[:, kept], index[:, kept]
            if stage < len(self.layers):
                x = self.layers[stage](x, image_guidance, text_guidance, settings.pooling, chunk)
        logits = in_chunks(lambda part: self.decoder(part, guides), x, 1, chunk)
        return CostLogits(scatter_classes(logits, index, classes), rejection)

    def _rejection_scores(self, x: Tensor, stage: int) -> Tensor:
        """Score the classes of (B, T, h, w, C) by a rejection head: (B, T, h, w). No gradient reaches x."""
        maps = x.detach().flatten(0, 1).permute(0, 3, 1, 2)
        scores: Tensor = self.rejection_heads[stage](maps)
        return scores[:, 0].unflatten(0, x.shape[:2])


def scatter_classes(logits: Tensor, index: Tensor, classes: int) -> Tensor:
    """Put the logits (B, T', H, W) of some classes among those of all (B, T, H, W).

    Args:
        logits: of the classes of ``index``.
        index: (B, T').
        classes: T. If T' is T, the logits are returned as they are.

    Returns:
        `ABSENT_LOGIT` for the other classes.
    """
    if index.shape[1] == classes:
        return logits
    everything = logits.new_full((len(logits), classes, *logits.shape[2:]), ABSENT_LOGIT)
    return everything.scatter(1, index[:, :, None, None].expand_as(logits), logits)


def class_chunk(batch: int, settings: AggregationSettings) -> int:
    """Return the number of classes that are processed at a time; 0: all."""
    if not settings.max_maps or torch.is_grad_enabled():
        return 0
    return max(1, settings.max_maps // batch)
