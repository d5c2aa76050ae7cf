"""open_clip's own ViT, e.g. of OpenAI, LAION, DataComp, MetaCLIP and CLIPA."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from open_clip.transformer import ResidualAttentionBlock, Transformer, VisionTransformer
from timm.layers import drop_path
from torch import Tensor, nn

from clipdense.clip.attention import AttentionParameters, Block, TokenStream
from clipdense.clip.position import resize_table
from clipdense.clip.towers.groups import TowerGroups, norm_parameters
from clipdense.clip.towers.transformer import BlockHook, TransformerTower


class ViTTower(TransformerTower):
    """open_clip's VisionTransformer with a class token, for any grid.

    Attributes:
        class_embedding_factor: factor of the class embedding; 2 after `double_class_embedding`.
        drop_path: rate of stochastic depth in the last block, see `set_drop_path`.
    """

    conv1: nn.Conv2d
    class_embedding: nn.Parameter
    positional_embedding: nn.Parameter
    ln_pre: nn.Module
    ln_post: nn.Module
    transformer: Transformer
    proj: nn.Parameter
    prefix = 1
    class_embedding_factor: int = 1
    drop_path: float = 0.0

    def __init__(self, visual: VisionTransformer, position_rule: str = "bicubic") -> None:
        super().__init__(visual, position_rule)
        if visual.attn_pool is not None or visual.pool_type not in ("tok", "avg"):
            raise ValueError(
                "a ViT with CoCa's attentional pooler has no per-patch image-text space and is not supported"
            )
        if not isinstance(visual.patch_dropout, nn.Identity):
            raise ValueError(
                "a ViT with patch dropout has no complete dense map: build it with patch_dropout 0"
            )
        if visual.patch_size[0] != visual.patch_size[1]:
            raise ValueError(f"patches of {visual.patch_size} are not square")
        self.stride = self.patch_size = visual.patch_size[0]
        self.grid, self.image_size = tuple(visual.grid_size), tuple(visual.image_size)
        self.embed_dim = visual.output_dim
        self.pool_type, self.pool_first = visual.pool_type, visual.final_ln_after_pool
        self.pools_class_token = visual.pool_type == "tok"
        depth = len(visual.transformer.resblocks)
        self.tap_channels = dict.fromkeys(range(depth), visual.conv1.out_channels)
        self.tap_strides = dict.fromkeys(range(depth), self.stride)

    def position_owner(self) -> Any:
        """Return the tower itself."""
        return self

    def groups(self) -> TowerGroups:
        """See `Tower.groups`."""
        return TowerGroups(
            stem=(self.class_embedding, self.conv1, self.ln_pre),
            blocks=tuple(self.blocks),
            projection=(self.ln_post, self.proj),
            positions=(self.positional_embedding,),
            norms=norm_parameters(self),
            attentions=self.attentions(),
        )

    @property
    def blocks(self) -> nn.ModuleList:
        """Residual attention blocks, first to last."""
        blocks: nn.ModuleList = self.transformer.resblocks
        return blocks

    def block(self, index: int) -> Block:
        """Return the view of one block."""
        depth = len(self.blocks)
        return ClipBlock(self.blocks[index], self.drop_path * (index % depth) / max(depth - 1, 1))

    def double_class_embedding(self) -> None:
        """See `Tower.double_class_embedding`."""
        self.class_embedding_factor = 2

    def set_drop_path(self, rate: float) -> None:
        """See `Tower.set_drop_path`."""
        self.drop_path = rate

    def embed(self, images: Tensor, hook: BlockHook | None) -> TokenStream:
        """Embed images: ln_pre([class; patches] + positions)."""
        patches = self.convolve_patches(images, self.conv1)
        h, w = patches.shape[-2:]
        stream = TokenStream(patches.flatten(2).transpose(1, 2), (h, w))
        if hook:
            stream = hook(-1, stream)
        cls = (
            self.class_embedding.to(patches.dtype).expand(images.shape[0], 1, -1)
            * self.class_embedding_factor
        )
        positions = resize_table(self.positional_embedding, self.grid, (h, w), self.position_rule)
        stream.x = self.ln_pre(torch.cat([cls, stream.x], dim=1) + positions.to(patches.dtype))
        return stream

    def norm_tokens(self, x: Tensor) -> Tensor:
        """Apply ln_post."""
        y: Tensor = self.ln_post(x)
        return y

    def project(self, x: Tensor) -> Tensor:
        """Multiply by the projection matrix."""
        return x @ self.proj

    def pool(self, x: Tensor) -> Tensor:
        """Embed the class token, or the mean of the patches (CLIPA), before or after the final norm."""
        x = x if self.pool_first else self.ln_post(x)
        x = x[:, 0] if self.pool_type == "tok" else x[:, 1:].mean(1)
        return self.project(self.ln_post(x) if self.pool_first else x)


class ClipBlock(Block):
    """View of open_clip's ResidualAttentionBlock (image or text).

    Attributes:
        drop_path: rate of stochastic depth in training.
    """

    def __init__(self, block: nn.Module, drop_path: float = 0.0) -> None:
        if not isinstance(block, ResidualAttentionBlock):
            raise ValueError(
                f"blocks of type {type(block).__name__} are not supported, only open_clip's default block"
            )
        self.source: Any = block
        self.heads = block.attn.num_heads
        self.drop_path = drop_path

    def normed(self, x: Tensor) -> Tensor:
        y: Tensor = self.source.ln_1(x)
        return y

    def qkv(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = F.linear(u, self.source.attn.in_proj_weight, self.source.attn.in_proj_bias).chunk(3, dim=-1)
        return q, k, v

    def key(self, u: Tensor) -> Tensor:
        return self._projection(u, 1)

    def value(self, u: Tensor) -> Tensor:
        return self._projection(u, 2)

    def out(self, y: Tensor) -> Tensor:
        return self._drop(self.source.ls_1(self.source.attn.out_proj(y)))

    def mlp(self, x: Tensor) -> Tensor:
        return self._drop(self.source.ls_2(self.source.mlp(self.source.ln_2(x))))

    def attention_parameters(self) -> AttentionParameters:
        return AttentionParameters.from_fused(self.source.attn.in_proj_weight, self.source.attn.in_proj_bias)

    def _drop(self, branch: Tensor) -> Tensor:
        y: Tensor = drop_path(branch, self.drop_path, self.source.training)
        return y

    def _projection(self, u: Tensor, part: int) -> Tensor:
        attn = self.source.attn
        return F.linear(u, attn.in_proj_weight.chunk(3)[part], attn.in_proj_bias.chunk(3)[part])
