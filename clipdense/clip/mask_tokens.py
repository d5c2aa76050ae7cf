"""Mask tokens: region embeddings from copies of the class token that attend within their mask."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from clipdense.clip.attention import TokenStream
from clipdense.clip.towers import TowerRequest, TransformerTower

__all__ = ["MaskTokens", "embed_mask_tokens"]


class MaskTokens:
    """Block hook that adds one copy of the embedded class token per mask.

    In every block, a copy attends to the tokens before the patches (the class token) and to the patches
    inside its mask, not to itself and not to other copies. No other token attends to a copy, so all other
    outputs of the forward are unchanged.

    Attributes:
        embeddings: (B, Q, D) in the joint space, not L2-normalised; available after a forward that requests
            `pooled`.

    Args:
        tower: the ViT.
        masks: (B, Q, h, w) at the size of the patch grid; a patch is inside where > 0. The copy of an empty
            mask attends to the class token only.

    Raises:
        ValueError: If the image embedding of the tower is not its class token.

    Source: Ding et al., Open-Vocabulary Universal Image Segmentation with MaskCLIP, ICML 2023; the "v1"
        extraction in the released code of CLIPSelf (Wu et al., ICLR 2024).
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
    """Embed regions by mask tokens; see `MaskTokens`.

    Args:
        tower: the ViT.
        images: (B, 3, H, W), normalised.
        masks: (B, Q, h, w) at the size of the patch grid.

    Returns:
        (B, Q, D) in the joint space, not L2-normalised.

    Raises:
        ValueError: If the masks do not have the size of the patch grid, or the image embedding of the tower
            is not its class token.
    """
    hook = MaskTokens(tower, masks)
    tower(images, TowerRequest(pooled=True), hook=hook)
    return hook.embeddings
