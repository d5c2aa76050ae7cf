"""Upsampling of aggregated cost embeddings to class logits (CAT-Seg, Cho et al., CVPR 2024, section 3.4)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["CostDecoder", "DoubleConv", "UpStage"]


class DoubleConv(nn.Module):
    """Two 3 x 3 convolutions, each with group norm and ReLU.

    The first takes the concatenation of maps per class, maps per image and further maps per class. The maps
    per image are convolved once for all classes.
    """

    def __init__(
        self, channels: int, shared_channels: int, out_channels: int, extra_channels: int = 0
    ) -> None:
        """
        Args:
            channels: of the maps per class.
            shared_channels: of the maps per image.
            out_channels: a multiple of 16.
            extra_channels: of the further maps per class (SED).

        Raises:
            ValueError: If ``out_channels`` is not a multiple of 16.
        """
        super().__init__()
        if out_channels % 16:
            raise ValueError(
                f"decoder width {out_channels} is not a multiple of 16, the size of a norm's group"
            )
        self.parts = [channels, shared_channels, extra_channels]
        self.conv1 = nn.Conv2d(sum(self.parts), out_channels, 3, padding=1, bias=False)
        self.norm1 = nn.GroupNorm(out_channels // 16, out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(out_channels // 16, out_channels)

    def forward(self, x: Tensor, shared: Tensor, extra: Tensor | None = None) -> Tensor:
        """Convolve maps (B * T, C, h, w), images first, with the maps (B, G, h, w) of their images.

        Args:
            x: maps per class.
            shared: maps per image.
            extra: further maps per class (B * T, E, h, w).
        """
        own, common, further = self.conv1.weight.split(self.parts, dim=1)
        if extra is not None:
            x, own = torch.cat([x, extra], 1), torch.cat([own, further], 1)
        images = shared.shape[0]
        y = F.conv2d(x, own, padding=1).unflatten(0, (images, -1))
        y = (y + F.conv2d(shared, common, padding=1)[:, None]).flatten(0, 1)
        y = F.relu(self.norm1(y))
        return F.relu(self.norm2(self.conv2(y)))


class UpStage(nn.Module):
    """Transposed convolution to twice the size, then `DoubleConv` with the guidance of that size."""

    def __init__(self, channels: int, guidance_channels: int, out_channels: int) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(channels, channels - guidance_channels, 2, 2)
        self.conv = DoubleConv(channels - guidance_channels, guidance_channels, out_channels)

    def forward(self, x: Tensor, guidance: Tensor) -> Tensor:
        """Upsample (B * T, C, h, w) with guidance (B, G, 2 h, 2 w)."""
        y: Tensor = self.conv(self.up(x), guidance)
        return y


class CostDecoder(nn.Module):
    """Upsampling stages and the head; the classes do not see each other."""

    def __init__(self, channels: int, guidance_channels: Sequence[int], widths: Sequence[int]) -> None:
        """
        Args:
            channels: of the cost embeddings.
            guidance_channels: of the guidance of each stage.
            widths: channels after each stage.
        """
        super().__init__()
        inputs = [channels, *widths[:-1]]
        stages = zip(inputs, guidance_channels, widths, strict=True)
        self.stages = nn.ModuleList(UpStage(*sizes) for sizes in stages)
        self.head = nn.Conv2d(widths[-1], 1, 3, padding=1)

    def forward(self, x: Tensor, guidance: Sequence[Tensor]) -> Tensor:
        """Compute logits (B, T, H, W) from (B, T, h, w, C) and the guidance (B, G, ., .) of each stage."""
        batch, maps = x.shape[0], x.flatten(0, 1).permute(0, 3, 1, 2)
        for stage, guide in zip(self.stages, guidance, strict=True):
            maps = stage(maps, guide)
        logits: Tensor = self.head(maps)
        return logits[:, 0].unflatten(0, (batch, -1))
