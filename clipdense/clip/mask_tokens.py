"""Mask tokens: region embeddings by copies of the class token that see only their mask."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from clipdense.clip.attention import TokenStream
from clipdense.clip.towers import TowerRequest, TransformerTower

__all__ = ["MaskTokens", "embed_mask_tokens"]


class MaskTokens:
    """A `BlockHook` that adds one copy of the embedded class token per mask.

    In every block a copy attends to the tokens before the patches (the class token) and to the patches inside
    its mask, not to itself nor to other copies; no other token attends to it, so what else the forward
    returns is unchanged. MaskCLIP of Ding et al., and the "v1" extraction of CLIPSelf
    (specs/clipself_fvlm_catseg_odise_fcclip.md 1.2).

    Attributes:
        embeddings: (B, Q, D) in the joint space, not L2-normalised, after a forward that wants "plain"
            outputs (`pooled`).

    Args:
        masks: (B, Q, h, w) at the size of the patch grid; a patch is inside where > 0. The copy of an empty
            mask attends to the class token alone.

    Raises:
        ValueError: the tower's image embedding is not its class token.
    """

    embeddings: Tensor

    def __init__(self, tower: TransformerTower, masks: Tensor) -> None:
        if not tower.pools_class_token:
            raise tower.cannot("mask tokens", "its image embedding is not its class token")
        self.tower, self.masks = tower, masks
        self.depth = len(tower.blocks)

    def __call__(self, index: int, stream: TokenStream) -> TokenStream:
        """Add the copies before the first block; embed them after the last."""
        start, count = self.tower.prefix, self.masks.shape[1]
        if index == 0:
            return self._add(stream)
        if index == self.depth:
            copies = stream.x[:, start : start + count]
            self.embeddings = self.tower.project(self.tower.norm_tokens(copies))
        return stream

    def _add(self, stream: TokenStream) -> TokenStream:
        batch, count, *size = self.masks.shape
        if (batch, *size) != (len(stream.x), *stream.grid):
            raise ValueError(
                f"masks {tuple(self.masks.shape)} do not fit {len(stream.x)} images of "
                f"{stream.grid[0]} x {stream.grid[1]} patches"
            )
        prefix = stream.x[:, : self.tower.prefix]
        copies = stream.x[:, :1].expand(-1, count, -1)
        x = torch.cat([prefix, copies, stream.patches], dim=1)
        inside = self.masks.to(x.device).flatten(2) > 0  # (B, Q, h * w)
        seen = x.new_ones(batch, x.shape[1], x.shape[1], dtype=torch.bool)
        start, end = prefix.shape[1], prefix.shape[1] + count
        seen[:, :, start:end] = False
        seen[:, start:end, end:] = inside
        bias = x.new_zeros(seen.shape).masked_fill(~seen, -torch.inf)
        return replace(stream, x=x, bias=bias[:, None])


def embed_mask_tokens(tower: TransformerTower, images: Tensor, masks: Tensor) -> Tensor:
    """Normalised images (B, 3, H, W) and masks (B, Q, h, w) on their patch grid -> (B, Q, D); see
    `MaskTokens`.

    Raises:
        ValueError: masks of another size than the grid, or a tower whose embedding is not its class token.
    """
    hook = MaskTokens(tower, masks)
    tower(images, TowerRequest(pooled=True), hook=hook)
    return hook.embeddings
