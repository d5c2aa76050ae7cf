"""The hierarchical decoder of SED (Xie et al., CVPR 2024): aggregation at each stage, and early rejection."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.convnext import ConvNeXtBlock
from torch import Tensor, nn

from clipdense.systems.catseg.aggregation import ClassAggregation, in_chunks
from clipdense.systems.catseg.cost import (
    AggregationSettings,
    CostLogits,
    class_chunk,
    cost_volume,
    keep_top_classes,
    scatter_classes,
)
from clipdense.systems.catseg.decoder import DoubleConv

__all__ = ["SEDAggregator", "SEDStage"]


class SEDStage(nn.Module):
    """A ConvNeXt block, class attention, and upsampling with the guidance of image and cost volume."""

    def __init__(
        self, channels: int, guidance_channels: int, out_channels: int, kernel: int, heads: int
    ) -> None:
        super().__init__()
        self.block = ConvNeXtBlock(channels, kernel_size=kernel, ls_init_value=1.0)
        self.classes = ClassAggregation(channels, 0, heads)
        self.up = nn.ConvTranspose2d(channels, channels - guidance_channels, 2, 2)
        self.conv = DoubleConv(
            channels - guidance_channels, guidance_channels, out_channels, guidance_channels
        )

    def aggregate(self, x: Tensor, pooling: tuple[int, int], chunk: int) -> Tensor:
        """Aggregate cost embeddings (B, T, h, w, C) over space, then over classes."""

        def mix(part: Tensor) -> Tensor:
            maps = self.block(part.flatten(0, 1).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
            return maps.contiguous().unflatten(0, part.shape[:2])

        y: Tensor = self.classes(in_chunks(mix, x, 1, chunk), None, pooling, chunk)
        return y

    def upsample(self, x: Tensor, guidance: Tensor, cost: Tensor) -> Tensor:
        """Upsample (B, T, h, w, C) with guidance (B, G, 2 h, 2 w) and cost guidance (B, T, G, 2 h, 2 w)."""
        maps = self.up(x.flatten(0, 1).permute(0, 3, 1, 2))
        maps = self.conv(maps, guidance, cost.flatten(0, 1)).permute(0, 2, 3, 1)
        return maps.unflatten(0, x.shape[:2])


class SEDAggregator(nn.Module):
    """From dense image embeddings and text embeddings to one logit map per class.

    Three stages aggregate the cost embeddings and double their size. Image guidance are the detached maps of
    the image tower's stages; cost guidance is a chain of transposed convolutions of the cost volume. A head
    on the detached embeddings before each stage scores the classes for category early rejection.
    """

    def __init__(
        self,
        *,
        prompts: int,
        guidance_dims: Sequence[int],
        hidden_dim: int = 128,
        heads: int = 4,
        decoder_guidance_dims: Sequence[int] = (32, 16, 8),
        decoder_dims: Sequence[int] = (64, 32, 16),
        kernels: Sequence[int] = (9, 9, 9),
    ) -> None:
        """
        Args:
            prompts: number P of prompts per class.
            guidance_dims: channels of the image tower's maps at 2, 4 and 8 times the size of the dense map.
            hidden_dim: C of the first cost embeddings.
            heads: heads of the class attentions.
            decoder_guidance_dims: channels of the guidance of each stage.
            decoder_dims: channels after each stage.
            kernels: side of the depthwise convolution of each stage.

        Raises:
            ValueError: If the heads do not divide a width.
        """
        super().__init__()
        inputs = [hidden_dim, *decoder_dims[:-1]]
        if any(width % heads for width in inputs):
            raise ValueError(f"MODEL.CAT_SEG.HEADS {heads} does not divide one of the widths {inputs}")
        self.cost_embedding = nn.Conv2d(prompts, hidden_dim, 7, padding=3)
        self.decoder_guidance = nn.ModuleList(
            nn.Conv2d(width, projected, 3, padding=1)
            for width, projected in zip(guidance_dims, decoder_guidance_dims, strict=True)
        )
        chain = zip([prompts, *decoder_guidance_dims[:-1]], decoder_guidance_dims, strict=True)
        self.cost_guidance = nn.ModuleList(nn.ConvTranspose2d(a, b, 2, 2) for a, b in chain)
        sizes = zip(inputs, decoder_guidance_dims, decoder_dims, kernels, strict=True)
        self.stages = nn.ModuleList(SEDStage(*stage, heads) for stage in sizes)
        self.rejection_heads = nn.ModuleList(nn.Conv2d(width, 1, 3, padding=1) for width in inputs)
        self.head = nn.Conv2d(decoder_dims[-1], 1, 3, padding=1)

    def forward(
        self,
        dense: Tensor,
        text: Tensor,
        guidance: Sequence[Tensor],
        settings: AggregationSettings | None = None,
    ) -> CostLogits:
        """Aggregate the cost volume of each image; see `CostAggregator`.

        Args:
            dense: dense image embeddings (B, D, h, w), not normalised.
            text: prompt embeddings (T, P, D).
            guidance: maps of the image tower at 2, 4 and 8 times the size; no gradient reaches them.
            settings: default: no pooling, everything at once, no rejection.
        """
        settings = settings or AggregationSettings()
        guides = [F.relu(layer(m.detach())) for layer, m in zip(self.decoder_guidance, guidance, strict=True)]
        if not settings.rejection_topk:
            return self._aggregate(dense, text, guides, settings)
        images = []
        for b in range(len(dense)):  # images keep different numbers of classes
            one = slice(b, b + 1)
            images.append(self._aggregate(dense[one], text, [guide[one] for guide in guides], settings))
        return CostLogits.concatenate(images)

    def embed_cost(self, volume: Tensor) -> Tensor:
        """Embed the cost volume (B, T, P, h, w) as (B, T, h, w, C)."""
        maps = self.cost_embedding(volume.flatten(0, 1)).permute(0, 2, 3, 1)
        return maps.contiguous().unflatten(0, volume.shape[:2])

    def _aggregate(
        self, dense: Tensor, text: Tensor, guides: Sequence[Tensor], settings: AggregationSettings
    ) -> CostLogits:
        """Run the stages on all classes, or reject classes before each of them; B is 1 with rejection."""
        classes, chunk = text.shape[0], class_chunk(dense.shape[0], settings)
        index = torch.arange(classes, device=dense.device).expand(dense.shape[0], -1)
        text = text.expand(dense.shape[0], *text.shape)

        x = in_chunks(lambda part: self.embed_cost(cost_volume(dense, part)), text, 1, chunk)
        rejection: list[Tensor] = []
        stages: Any = self.stages
        for i, stage in enumerate(stages):
            scores = _map_head(self.rejection_heads[i], x.detach(), chunk)
            rejection.append(scatter_classes(scores, index, classes))
            if settings.rejection_topk:
                kept = keep_top_classes(scores[0], settings.rejection_topk)
                x, text, index = x[:, kept], text[:, kept], index[:, kept]
            x = stage.aggregate(x, settings.pooling, chunk)
            last = i == len(self.stages) - 1
            parts = [
                self._upsample(i, part, dense, names, guides[i], last)
                for part, names in _class_parts(chunk, x, text)
            ]
            x = torch.cat(parts, 1)
        return CostLogits(scatter_classes(x, index, classes), rejection)

    def _upsample(self, i: int, x: Tensor, dense: Tensor, text: Tensor, guide: Tensor, last: bool) -> Tensor:
        """Upsample some classes of stage i; the last stage gives their logits (B, T, H, W)."""
        cost = cost_volume(dense, text).flatten(0, 1)
        for layer in self.cost_guidance[: i + 1]:
            cost = F.relu(layer(cost))
        stage: Any = self.stages[i]
        x = stage.upsample(x, guide, cost.unflatten(0, text.shape[:2]))
        return _map_head(self.head, x, 0) if last else x.contiguous()


def _class_parts(chunk: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Split tensors (B, T, ...) along the classes."""
    size = chunk or max(1, tensors[0].shape[1])
    yield from zip(*(t.split(size, 1) for t in tensors), strict=True)


def _map_head(head: Callable[[Tensor], Tensor], x: Tensor, chunk: int) -> Tensor:
    """Apply a convolution to one channel: (B, T, h, w, C) to (B, T, h, w)."""

    def run(part: Tensor) -> Tensor:
        return head(part.flatten(0, 1).permute(0, 3, 1, 2))[:, 0].unflatten(0, part.shape[:2])

    return in_chunks(run, x, 1, chunk)
