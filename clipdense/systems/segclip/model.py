"""SegCLIP's image tower: CLIP's blocks with a grouping of the patches between them."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from clipdense.clip.attention import TokenStream, plain
from clipdense.clip.position import resize_table
from clipdense.clip.towers import Tower, ViTTower
from clipdense.clip.towers.vit import ClipBlock
from clipdense.systems.segclip.decoder import TokenMask
from clipdense.systems.segclip.groups import Grouping, SemanticGroups, TokenReconstruction

__all__ = ["GroupedImage", "SegCLIPTower", "run_blocks"]


@dataclass
class GroupedImage:
    """Embedding of a batch of images.

    Attributes:
        image: image embeddings (B, D), not L2-normalised.
        groups: embeddings of the groups (B, G, D), not L2-normalised.
        grouping: assignment of the patches.
        grid: (h, w) of the patches.
    """

    image: Tensor
    groups: Tensor
    grouping: Grouping
    grid: tuple[int, int]


class SegCLIPTower(nn.Module):
    """CLIP's ViT without class token: blocks on patches, semantic groups, blocks on groups.

    The image embedding is the maximum over the groups, normed and projected.

    Source: Luo et al., SegCLIP, ICML 2023, section 3.
    """

    def __init__(
        self,
        tower: Tower,
        *,
        group_layers: int = 2,
        reconstruct_layers: int = 2,
        centers: int = 8,
        cross_layers: int = 2,
        mixed_keys: bool = False,
    ) -> None:
        """
        Args:
            tower: CLIP's ViT, whose parts are used; its last blocks become the blocks on groups.
            group_layers: number of blocks on groups.
            reconstruct_layers: number of blocks on reconstructed tokens, which start as copies of the last
                ones; 0: none, and no reconstruction.
            centers: G, number of groups.
            cross_layers, mixed_keys: see `SemanticGroups`.

        Raises:
            ValueError: If the tower is not open_clip's ViT with a class token, has too few blocks, or has
                overlapping patches.
        """
        super().__init__()
        if not isinstance(tower, ViTTower) or not tower.pools_class_token:
            raise tower.cannot("semantic groups", "SegCLIP needs open_clip's ViT with a class token")
        if tower.stride != tower.patch_size:
            raise tower.cannot("semantic groups", "its patches overlap: set MODEL.CLIP.PATCH_STRIDE 0")
        blocks = list(tower.blocks)
        if not 0 < group_layers < len(blocks) or reconstruct_layers > len(blocks):
            raise tower.cannot(
                f"{group_layers} blocks on groups and {reconstruct_layers} on reconstructed tokens",
                f"it has {len(blocks)} blocks, of which at least one works on patches",
            )
        width, heads = tower.conv1.out_channels, tower.block(0).heads
        self.native_grid, self.patch_size = tower.grid, tower.patch_size
        self.position_rule = tower.position_rule
        self.conv1, self.ln_pre, self.ln_post = tower.conv1, tower.ln_pre, tower.ln_post
        # in the published files; the class token is dropped before the first block
        self.class_embedding = tower.class_embedding.requires_grad_(False)
        self.positional_embedding, self.proj = tower.positional_embedding, tower.proj
        self.patch_blocks = nn.ModuleList(blocks[:-group_layers])
        self.group_blocks = nn.ModuleList(blocks[-group_layers:])
        self.reconstruct_blocks = nn.ModuleList(
            deepcopy(blocks[len(blocks) - reconstruct_layers :]) if reconstruct_layers else []
        )
        self.groups = SemanticGroups(
            width, heads, centers=centers, layers=cross_layers, mixed_keys=mixed_keys
        )
        self.reconstruction = TokenReconstruction(centers) if reconstruct_layers else None

    def embed(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Embed normalised images (B, 3, H, W) as patch tokens (B, L, C) that enter the first block."""
        patches = self.conv1(images)
        grid = (patches.shape[2], patches.shape[3])
        positions = resize_table(self.positional_embedding, self.native_grid, grid, self.position_rule)[1:]
        x: Tensor = self.ln_pre(patches.flatten(2).transpose(1, 2) + positions)
        return x, grid

    def forward(self, images: Tensor, noise: Tensor | None = None) -> GroupedImage:
        """Embed images and their groups.

        Args:
            images: (B, 3, H, W), normalised.
            noise: Gumbel noise (B, G, L) of training, or None.
        """
        x, grid = self.embed(images)
        grouping = self.groups(run_blocks(self.patch_blocks, x), noise)
        y = run_blocks(self.group_blocks, grouping.tokens)
        return GroupedImage(self.project(y.amax(1)), self.project(y), grouping, grid)

    def reconstruct(self, images: Tensor, mask: TokenMask, noise: Tensor | None = None) -> Tensor:
        """Compute the tokens of the visible patches from their groups, (B, 1 + n, C), their mean first.

        Args:
            images: (B, 3, H, W), normalised.
            mask: visible patches, see `mask_tokens`.
            noise: Gumbel noise (B, G, n) of training, or None.
        """
        return self.reconstruct_grouping(self.group_visible(images, mask, noise))

    def group_visible(self, images: Tensor, mask: TokenMask, noise: Tensor | None = None) -> Grouping:
        """Group the visible patches of images alone; arguments as of `reconstruct`."""
        x, _ = self.embed(images)
        visible = (mask.visible[:, 1:] - 1)[:, :, None].expand(-1, -1, x.shape[2])
        grouping: Grouping = self.groups(run_blocks(self.patch_blocks, x.gather(1, visible)), noise)
        return grouping

    def reconstruct_grouping(self, grouping: Grouping) -> Tensor:
        """Compute the tokens of patches from their groups, their mean first, (B, 1 + n, C)."""
        if self.reconstruction is None:
            raise ValueError("this SegCLIP has no reconstruction: build it with reconstruct_layers")
        z = run_blocks(self.reconstruct_blocks, self.reconstruction(grouping))
        return torch.cat([z.mean(1, keepdim=True), z], dim=1)

    def project(self, x: Tensor) -> Tensor:
        """Norm and project tokens (..., C) to the joint space (..., D)."""
        y: Tensor = self.ln_post(x) @ self.proj
        return y


def run_blocks(blocks: nn.ModuleList, x: Tensor) -> Tensor:
    """Run CLIP's blocks on tokens (B, L, C)."""
    stream = TokenStream(x, (0, 0))
    for block in blocks:
        stream = plain(ClipBlock(block), stream)
    return stream.x
