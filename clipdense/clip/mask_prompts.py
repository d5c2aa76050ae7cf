"""Mask prompt tuning: learned tokens replace the patches outside a mask."""

from __future__ import annotations

import logging
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

_log = logging.getLogger(__name__)


def patch_keep(masks: Tensor, stride: int) -> Tensor:
    """Find the patches with any pixel inside a mask.

    Args:
        masks: (N, 1, H, W); a pixel is inside where > 0.
        stride: side of a patch in pixels.

    Returns:
        (N, h * w) bool, row-major.
    """
    return F.max_pool2d(masks.float(), stride).flatten(1) > 0


class MaskPrompts(nn.Module):
    """Mask prompt tuning of a ViT.

    Patches without a pixel of the mask are replaced by learned tokens: in the input, before positions are
    added, by the first set of prompts, and in the input of block d by the d-th set, for every d below the
    depth. The class token is never replaced. Replaced tokens are attended to like any other token. Sets
    beyond the blocks of the tower have no effect, as in the released code of OVSeg.

    Attributes:
        prompts: (depth, h * w, C), one per place of the patch grid, or (depth, 1, C), shared by all places.
            Depth 0 changes nothing.

    Source: Liang et al., Open-Vocabulary Semantic Segmentation with Mask-adapted CLIP (OVSeg), CVPR 2023,
        section 3.3.
    """

    def __init__(self, depth: int, positions: int, width: int, std: float = 0.02) -> None:
        """
        Args:
            depth: number of sets of prompts.
            positions: h * w of the tower's grid, or 1.
            width: C of the tower's tokens.
            std: standard deviation of the initial normal distribution.
        """
        super().__init__()
        self.prompts = nn.Parameter(torch.randn(depth, positions, width) * std)

    @classmethod
    def of(cls, tower: Tower, depth: int) -> MaskPrompts:
        """Create new prompts of a depth for a tower.

        Raises:
            ValueError: If the tower is not a ViT or has fewer blocks than the depth.
        """
        if not isinstance(tower, TransformerTower):
            raise tower.cannot("mask prompts", "only ViTs have tokens")
        if depth > len(tower.blocks):
            raise tower.cannot(f"mask prompts of depth {depth}", f"it has {len(tower.blocks)} blocks")
        height, width = tower.grid
        return cls(depth, height * width, tower.tap_channels[0])

    def check(self, tower: Tower) -> None:
        """Check loaded prompts against a tower; log a warning if some sets have no effect.

        Raises:
            ValueError: If the tower is not a ViT.
        """
        if not isinstance(tower, TransformerTower):
            raise tower.cannot("mask prompts", "only ViTs have tokens")
        if len(self.prompts) > len(tower.blocks):
            _log.warning(
                "Ignoring mask prompts %d to %d: the tower has %d blocks",
                len(tower.blocks) + 1,
                len(self.prompts),
                len(tower.blocks),
            )

    def hook(self, keep: Tensor) -> BlockHook:
        """Return the block hook for a batch whose patches ``keep`` (N, h * w) are not replaced."""
        return _Replacement(self.prompts, keep[:, :, None])

    def forward(self, tower: TransformerTower, images: Tensor, masks: Tensor) -> Tensor:
        """Embed masked images.

        Args:
            tower: the ViT.
            images: (N, 3, H, W), normalised.
            masks: (N, 1, H, W); a pixel is inside where > 0.

        Returns:
            (N, D) image embeddings, not L2-normalised.

        Raises:
            ValueError: If the images have another patch grid than the prompts.
        """
        hook = self.hook(patch_keep(masks, tower.stride))
        embeddings: Tensor = tower(images, TowerRequest(pooled=True), hook=hook).pooled
        return embeddings


def load_mask_prompts(path: str | Path, *, allow_pickle: bool = False) -> MaskPrompts | None:
    """Load the mask prompts from the file of a CLIP; None if it has none.

    Args:
        path: weight file.
        allow_pickle: see `clipdense.checkpoint.read_checkpoint`, whose errors this raises.
    """
    prompts = read_checkpoint(path, allow_pickle=allow_pickle, lazy=True).state.get(MASK_PROMPTS)
    if prompts is None or not len(prompts):
        return None
    module = MaskPrompts(*prompts.shape)
    module.load_state_dict({"prompts": prompts})
    return module


class _Replacement:
    """Block hook that replaces patches by prompts."""

    def __init__(self, prompts: Tensor, keep: Tensor) -> None:
        self.prompts, self.keep = prompts, keep

    def __call__(self, index: int, stream: TokenStream) -> TokenStream:
        # set 0 replaces patches in the embeddings (index -1), so block 0 has no set of its own
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
