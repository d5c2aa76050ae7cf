"""SegCLIP's masked reconstruction: random masks, and the decoder from visible tokens to pixels."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

__all__ = ["MaskedDecoder", "TokenMask", "mask_tokens", "patch_pixels", "reconstruction_loss"]


@dataclass
class TokenMask:
    """Random choice of visible tokens, the class token (0) always among them.

    Attributes:
        visible: (B, n) positions of the visible tokens, the class token first.
        restore: (B, 1 + L) place of every token in [visible; masked].
        masked: (B, 1 + L), 1 where a token is masked.
    """

    visible: Tensor
    restore: Tensor
    masked: Tensor


def mask_tokens(noise: Tensor, keep: float = 0.25) -> TokenMask:
    """Keep the floor(keep (1 + L)) tokens with the smallest noise.

    Args:
        noise: (B, 1 + L) random numbers; those of the class token are ignored.
        keep: share of visible tokens.

    Source: He et al., Masked Autoencoders Are Scalable Vision Learners, CVPR 2022, section 3.
    """
    noise = noise.clone()
    noise[:, 0] = -torch.inf
    order = noise.argsort(1)
    count = int(keep * noise.shape[1])
    restore = order.argsort(1)
    return TokenMask(order[:, :count], restore, (restore >= count).to(noise.dtype))


def patch_pixels(images: Tensor, patch: int) -> Tensor:
    """Cut images (B, 3, H, W) into patches (B, h * w, patch * patch * 3): row, column, channel."""
    batch, channels, height, width = images.shape
    grid = images.reshape(batch, channels, height // patch, patch, width // patch, patch)
    return grid.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def reconstruction_loss(predicted: Tensor, pixels: Tensor, masked: Tensor) -> Tensor:
    """Compute the mean squared error of the masked patches.

    Args:
        predicted, pixels: (B, L, patch * patch * 3).
        masked: (B, L), 1 where a patch is masked.
    """
    error = (predicted - pixels).square().mean(2)
    return (error * masked).sum() / masked.sum().clamp(min=1)


class MaskedDecoder(nn.Module):
    """Transformer from visible tokens to the pixels of all patches.

    Source: Luo et al., SegCLIP, ICML 2023, section 3.3; He et al., CVPR 2022, section 3.
    """

    def __init__(
        self,
        width: int,
        patches: int,
        patch: int,
        *,
        decoder_width: int = 384,
        depth: int = 3,
        heads: int = 8,
    ) -> None:
        """
        Args:
            width: C of the visible tokens.
            patches: number L of patches of an image.
            patch: side of a patch in pixels.
            decoder_width, depth, heads: sizes of the decoder.
        """
        super().__init__()
        self.decoder_embed = nn.Linear(width, decoder_width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_width))
        nn.init.normal_(self.mask_token, std=0.02)
        self.decoder_pos_embed = nn.Parameter(_sine_positions(patches, decoder_width), requires_grad=False)
        norm = partial(nn.LayerNorm, eps=1e-6)
        self.decoder_blocks = nn.ModuleList(
            Block(decoder_width, heads, mlp_ratio=4.0, qkv_bias=True, norm_layer=norm) for _ in range(depth)
        )
        self.decoder_norm = norm(decoder_width)
        self.decoder_pred = nn.Linear(decoder_width, patch * patch * 3)

    def forward(self, tokens: Tensor, restore: Tensor) -> Tensor:
        """Predict the pixels (B, L, patch * patch * 3) of all patches.

        Args:
            tokens: visible tokens (B, n, C), the class token first.
            restore: (B, 1 + L) place of every token in [visible; masked].
        """
        x = self.decoder_embed(tokens)
        missing = restore.shape[1] - x.shape[1]
        x = torch.cat([x, self.mask_token.expand(len(x), missing, -1)], dim=1)
        x = x.gather(1, restore[:, :, None].expand(-1, -1, x.shape[2])) + self.decoder_pos_embed
        for block in self.decoder_blocks:
            x = block(x)
        pixels: Tensor = self.decoder_pred(self.decoder_norm(x))[:, 1:]
        return pixels


def _sine_positions(patches: int, width: int) -> Tensor:
    """Compute fixed positions (1, 1 + L, width) of a square grid, 0 for the class token."""
    side = round(patches**0.5)
    frequency = 1 / 10000 ** (torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    line = torch.arange(side, dtype=torch.float64)
    rows, columns = torch.meshgrid(line, line, indexing="ij")
    parts = []
    for axis in (columns, rows):
        angle = axis.reshape(-1, 1) * frequency
        parts += [angle.sin(), angle.cos()]
    table = torch.cat(parts, dim=1).float()
    return torch.cat([torch.zeros(1, table.shape[1]), table])[None]
