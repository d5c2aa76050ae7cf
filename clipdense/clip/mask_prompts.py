"""Mask prompt tuning: learned tokens in place of the patches outside a mask."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipdense.checkpoint import read_checkpoint
from clipdense.clip.attention import TokenStream
from clipdense.clip.layouts import MASK_PROMPTS
from clipdense.clip.towers import BlockHook, Tower, TowerRequest, TransformerTower

__all__ = ["MaskPrompts", "load_mask_prompts", "patch_keep"]


def patch_keep(masks: Tensor, stride: int) -> Tensor:
    """Masks (N, 1, H, W), inside where > 0, -> (N, h * w) bool: the patches with any pixel inside."""
    return F.max_pool2d(masks.float(), stride).flatten(1) > 0


class MaskPrompts(nn.Module):
    """Mask prompt tuning of a ViT (Liang et al., OVSeg, CVPR 2023, section 3.3).

    Patches without a pixel of the mask are replaced: in the input, before positions are added, by the first
    set of prompts; in what enters block d, for every d below the depth, by the d-th. The class token never
    is, and replaced tokens are attended to like any other.

    Attributes:
        prompts: (depth, h * w, C), one a place of the patch grid, or (depth, 1, C), shared by all places.
            Depth 0 changes nothing.
    """

    def __init__(self, depth: int, positions: int, width: int, std: float = 0.02) -> None:
        """
        Args:
            depth: sets of prompts.
            positions: h * w of the tower's grid, or 1.
            width: C of the tower's tokens.
            std: of the normal distribution at the start.
        """
        super().__init__()
        self.prompts = nn.Parameter(torch.randn(depth, positions, width) * std)

    @classmethod
    def of(cls, tower: Tower, depth: int) -> MaskPrompts:
        """New ones of a depth for a tower.

        Raises:
            ValueError: it is no ViT.
        """
        if not isinstance(tower, TransformerTower):
            raise tower.cannot("mask prompts", "only ViTs have tokens")
        height, width = tower.grid
        return cls(depth, height * width, tower.tap_channels[0])

    def hook(self, keep: Tensor) -> BlockHook:
        """The hook for a batch whose patches `keep` (N, h * w) stay."""
        return _Replacement(self.prompts, keep[:, :, None])

    def forward(self, tower: TransformerTower, images: Tensor, masks: Tensor) -> Tensor:
        """Normalised images (N, 3, H, W) and their masks (N, 1, H, W), inside where > 0, -> image embeddings
        (N, D), not L2-normalised.

        Raises:
            ValueError: more prompts than blocks, or an image of another grid than the prompts.
        """
        if len(self.prompts) > len(tower.blocks):
            raise tower.cannot(
                f"mask prompts of depth {len(self.prompts)}", f"it has {len(tower.blocks)} blocks"
            )
        hook = self.hook(patch_keep(masks, tower.stride))
        embeddings: Tensor = tower(images, TowerRequest(pooled=True), hook=hook).pooled
        return embeddings


def load_mask_prompts(path: str | Path, *, allow_pickle: bool = False) -> MaskPrompts | None:
    """The mask prompts that the file of a CLIP holds beside it; None where it holds none.

    Args:
        allow_pickle: see `clipdense.checkpoint.read_checkpoint`, whose errors this raises.
    """
    prompts = read_checkpoint(path, allow_pickle=allow_pickle, lazy=True).state.get(MASK_PROMPTS)
    if prompts is None or not len(prompts):
        return None
    module = MaskPrompts(*prompts.shape)
    module.load_state_dict({"prompts": prompts})
    return module


class _Replacement:
    def __init__(self, prompts: Tensor, keep: Tensor) -> None:
        self.prompts, self.keep = prompts, keep

    def __call__(self, index: int, stream: TokenStream) -> TokenStream:
        """The input is index -1; what enters block 0 has been replaced there."""
        depth = max(index, 0)
        if index == 0 or depth >= len(self.prompts):
            return stream
        patches = stream.patches
        if self.prompts.shape[1] not in (1, patches.shape[1]):
            raise ValueError(
                f"mask prompts for {self.prompts.shape[1]} patches do not fit {stream.grid[0]} x "
                f"{stream.grid[1]}: resize the images to the size that the prompts were trained at"
            )
        replaced = torch.where(self.keep, patches, self.prompts[depth].to(patches.dtype))
        before = stream.x[:, : stream.x.shape[1] - patches.shape[1]]
        return replace(stream, x=torch.cat([before, replaced], dim=1))
