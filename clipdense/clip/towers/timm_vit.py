"""Transformers that open_clip takes from timm: EVA-CLIP, SigLIP, Perception Encoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from open_clip.timm_model import TimmModel
from timm.layers import AttentionPoolLatent, PatchEmbed, RotaryEmbeddingCat
from timm.models.eva import EvaBlock, EvaBlockPostNorm
from timm.models.vision_transformer import Block as TimmBlock
from torch import Tensor, nn

from clipdense.clip.attention import AttentionParameters, Block, ParameterRows, TokenStream, row_parts
from clipdense.clip.position import resize_table, rope_table
from clipdense.clip.roi_align import roi_align
from clipdense.clip.towers.groups import TowerGroups, around, norm_parameters
from clipdense.clip.towers.transformer import BlockHook, TransformerTower

HEAD_MODES = ("plain", "value", "clipself", "maskclip")
"""Dense modes of attention-pooling heads."""


class TimmViTTower(TransformerTower):
    """timm's Eva and VisionTransformer, for any grid.

    An attention-pooling head (MAP: SigLIP, Perception Encoder) is the region pooling of its tower, and runs
    on every patch for `dense`: in "plain" each patch is the query of an attention over all patches (FG-CLIP
    2), in "value" each patch attends to itself only (MaskCLIP). RoPE is computed for every grid, see
    `clipdense.clip.position.rope_table`.
    """

    trunk: Any  # Eva or VisionTransformer
    head: nn.Module

    def __init__(self, visual: TimmModel, position_rule: str = "bicubic") -> None:
        super().__init__(visual, position_rule)
        trunk, patches = self.trunk, self.trunk.patch_embed
        if type(patches) is not PatchEmbed or patches.patch_size[0] != patches.patch_size[1]:
            raise ValueError("a transformer without one square patch convolution is not supported")
        if isinstance(trunk.patch_drop, nn.Module) and not isinstance(trunk.patch_drop, nn.Identity):
            raise ValueError(
                "a ViT with patch dropout has no complete dense map: build it with patch_drop_rate 0"
            )
        rope = getattr(trunk, "rope", None)
        if rope is not None and (type(rope) is not RotaryEmbeddingCat or rope.in_pixels or rope.rotate_half):
            raise ValueError(
                f"this {type(rope).__name__} is not supported, only axial RoPE of interleaved pairs"
            )
        self.stride = self.patch_size = patches.patch_size[0]
        self.grid, self.image_size = tuple(patches.grid_size), tuple(patches.img_size)
        self.prefix, self.class_token = trunk.num_prefix_tokens, trunk.cls_token is not None
        self.pools_class_token = self.class_token and trunk.global_pool == "token"
        depth = len(trunk.blocks)
        self.tap_channels = dict.fromkeys(range(depth), trunk.embed_dim)
        self.tap_strides = dict.fromkeys(range(depth), self.stride)
        self.embed_dim = _out_features(self.head) or _out_features(trunk.head) or trunk.embed_dim
        self.pools_regions = trunk.attn_pool is not None
        if self.pools_regions and not isinstance(trunk.attn_pool, AttentionPoolLatent):
            self.why_no_dense = f"its head is a {type(trunk.attn_pool).__name__}, which has no values"

    @property
    def dense_modes(self) -> tuple[str, ...]:
        """Last-block modes; with an attention-pooling head, the modes of the head."""
        modes = super().dense_modes
        return tuple(mode for mode in modes if mode in HEAD_MODES) if self.pools_regions else modes

    def block_mode(self, mode: str) -> str:
        """Return "plain" with an attention-pooling head, whose modes concern the head."""
        return "plain" if self.pools_regions else mode

    def localize(self, x: Tensor, mode: str) -> Tensor:
        """Run an attention-pooling head on every patch; see the class."""
        if not self.pools_regions:
            return x
        pool: Any = self.trunk.attn_pool
        if pool.pos_embed is not None:
            raise self.cannot("a dense map", "its attention-pooling head has positions")
        k, v = pool.kv(x).chunk(2, dim=-1)
        if mode == "plain":
            q, k, values = (t.unflatten(2, (pool.num_heads, -1)).transpose(1, 2) for t in (pool.q(x), k, v))
            y = F.scaled_dot_product_attention(pool.q_norm(q), pool.k_norm(k), values)
            v = y.transpose(1, 2).flatten(2)
        z: Tensor = pool.proj(v)
        return z if pool.mlp is None else z + pool.mlp(pool.norm(z))

    @property
    def blocks(self) -> nn.ModuleList:
        """Transformer blocks, first to last."""
        blocks: nn.ModuleList = self.trunk.blocks
        return blocks

    def block(self, index: int) -> Block:
        """Return the view of one block."""
        return TimmBlockView(self.blocks[index])

    def groups(self) -> TowerGroups:
        """See `Tower.groups`; an attention-pooling head is part of the projection."""
        before, after = around(self.trunk, self.blocks)
        positions = () if self.trunk.pos_embed is None else (self.trunk.pos_embed,)
        tokens = (
            p for p in self.trunk.parameters(recurse=False) if not any(p is table for table in positions)
        )
        attentions, pool = self.attentions(), self.trunk.attn_pool
        if pool is not None:
            keys_values = (pool.kv.weight, pool.kv.bias)
            attentions += (
                AttentionParameters(
                    tuple(ParameterRows(p) for p in pool.q.parameters()),
                    row_parts(keys_values, 0, 2),
                    row_parts(keys_values, 1, 2),
                ),
            )
        return TowerGroups(
            stem=(*tokens, *before),
            blocks=tuple(self.blocks),
            projection=(*after, self.head),
            positions=positions,
            norms=norm_parameters(self),
            attentions=attentions,
        )

    def embed(self, images: Tensor, hook: BlockHook | None) -> TokenStream:
        """Embed images: norm_pre([class; registers; patches] + positions), with the grid's RoPE table."""
        trunk = self.trunk
        patches = self.convolve_patches(images, trunk.patch_embed.proj)
        h, w = patches.shape[-2:]
        patches = trunk.patch_embed.norm(patches.flatten(2).transpose(1, 2))
        stream = TokenStream(patches, (h, w), rope=self._rope((h, w)))
        if hook:
            stream = hook(-1, stream)
        x = stream.x
        tokens = [t.expand(x.shape[0], -1, -1) for t in (trunk.cls_token, trunk.reg_token) if t is not None]
        if trunk.pos_embed is None:
            x = torch.cat([*tokens, x], dim=1)
        else:
            prefix = 0 if trunk.no_embed_class else self.prefix
            positions = resize_table(trunk.pos_embed[0], self.grid, (h, w), self.position_rule, prefix)
            if trunk.no_embed_class:
                x = torch.cat([*tokens, x + positions], dim=1)
            else:
                x = torch.cat([*tokens, x], dim=1) + positions
        stream.x = trunk.norm_pre(trunk.pos_drop(x))
        return stream

    def norm_tokens(self, x: Tensor) -> Tensor:
        """Apply the trunk's final norm."""
        y: Tensor = self.trunk.norm(x)
        return y

    def project(self, x: Tensor) -> Tensor:
        """Apply the trunk's classifier head, then open_clip's projection, to each token."""
        y: Tensor = self.head(self.trunk.head(self.trunk.head_drop(self.trunk.fc_norm(x))))
        return y

    def pool(self, x: Tensor) -> Tensor:
        """Embed images by the trunk's own pooling (class token, mean or MAP head) and the projection."""
        y: Tensor = self.head(self.trunk.forward_head(self.norm_tokens(x)))
        return y

    def embed_boxes(self, features: Tensor, boxes: Sequence[Tensor]) -> Tensor:
        """MAP head over each box: RoIAlign of `pre` to the native grid (aligned, adaptive sampling)."""
        if self.trunk.attn_pool is None:
            return super().embed_boxes(features, boxes)
        rois = roi_align(features, boxes, self.grid, scale=1 / self.stride)
        return self._map_head(rois.flatten(2).transpose(1, 2), None)

    def embed_masks(self, features: Tensor, masks: Tensor) -> Tensor:
        """MAP head over the patches inside each mask (> 0); an empty mask pools the whole map."""
        if self.trunk.attn_pool is None:
            return super().embed_masks(features, masks)
        inside = masks.flatten(2) > 0
        inside = (inside | ~inside.any(2, keepdim=True)).flatten(0, 1)[:, None, None]
        tokens = features.flatten(2).transpose(1, 2).repeat_interleave(masks.shape[1], dim=0)
        return self._map_head(tokens, inside).reshape(*masks.shape[:2], -1)

    def _map_head(self, tokens: Tensor, inside: Tensor | None) -> Tensor:
        return self.project(self.trunk.attn_pool(tokens, attn_mask=inside))

    def _rope(self, grid: tuple[int, int]) -> tuple[Tensor, Tensor] | None:
        rope: Any = getattr(self.trunk, "rope", None)
        if rope is None:
            return None
        reference = None if rope.ref_feat_shape is None else tuple(rope.ref_feat_shape)
        return rope_table(
            grid,
            rope.dim,
            reference,
            temperature=rope.temperature,
            offset=rope.grid_offset,
            order=rope.grid_indexing,
            spacing=self.stride / self.patch_size,
            device=rope.bands.device,
        )


class TimmBlockView(Block):
    """View of timm's EvaBlock, EvaBlockPostNorm and ViT Block, with fused or separate projections."""

    def __init__(self, block: Any) -> None:
        if not isinstance(block, EvaBlock | EvaBlockPostNorm | TimmBlock):
            raise ValueError(f"blocks of type {type(block).__name__} are not supported")
        attn: Any = block.attn
        if (
            getattr(attn, "gate", None) is not None
            or getattr(attn, "num_kv_heads", attn.num_heads) != attn.num_heads
        ):
            raise ValueError("gated and grouped-query attention are not supported")
        self.source: Any = block
        self.attn, self.heads = attn, attn.num_heads
        self.dropout = attn.attn_drop.p if block.training else 0.0
        self.post_norm = isinstance(block, EvaBlockPostNorm)

    def normed(self, x: Tensor) -> Tensor:
        return x if self.post_norm else self.source.norm1(x)

    def qkv(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.attn.qkv is None:
            return self.attn.q_proj(u), self.attn.k_proj(u), self.attn.v_proj(u)
        q, k, v = F.linear(u, self.attn.qkv.weight, self._bias()).chunk(3, dim=-1)
        return q, k, v

    def key(self, u: Tensor) -> Tensor:
        y: Tensor = self.attn.k_proj(u) if self.attn.qkv is None else self._part(u, 1)
        return y

    def value(self, u: Tensor) -> Tensor:
        y: Tensor = self.attn.v_proj(u) if self.attn.qkv is None else self._part(u, 2)
        return y

    def norm_heads(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return self.attn.q_norm(q), self.attn.k_norm(k)

    def out(self, y: Tensor) -> Tensor:
        y = self.attn.proj_drop(self.attn.proj(self.attn.norm(y)))
        return self.source.drop_path1(self.source.norm1(y) if self.post_norm else self._scale(y, 1))  # type: ignore[no-any-return]

    def mlp(self, x: Tensor) -> Tensor:
        block = self.source
        y = block.norm2(block.mlp(x)) if self.post_norm else self._scale(block.mlp(block.norm2(x)), 2)
        return block.drop_path2(y)  # type: ignore[no-any-return]

    def attention_parameters(self) -> AttentionParameters:
        attn = self.attn
        if attn.qkv is None:
            return AttentionParameters.from_linears(attn.q_proj, attn.k_proj, attn.v_proj)
        fused = AttentionParameters.from_fused(attn.qkv.weight, attn.qkv.bias)
        if getattr(attn, "q_bias", None) is None:
            return fused
        # EVA has no bias of keys: k_bias is a buffer of zeros
        q, v = ParameterRows(attn.q_bias), ParameterRows(attn.v_bias)
        return AttentionParameters((*fused.q, q), fused.k, (*fused.v, v))

    def _scale(self, y: Tensor, branch: int) -> Tensor:
        if isinstance(self.source, TimmBlock):
            return getattr(self.source, f"ls{branch}")(y)  # type: ignore[no-any-return]
        gamma = getattr(self.source, f"gamma_{branch}")
        return y if gamma is None else gamma * y

    def _bias(self) -> Tensor | None:
        if getattr(self.attn, "q_bias", None) is None:
            return self.attn.qkv.bias  # type: ignore[no-any-return]
        return torch.cat([self.attn.q_bias, self.attn.k_bias, self.attn.v_bias])

    def _part(self, u: Tensor, part: int) -> Tensor:
        bias = self._bias()
        return F.linear(u, self.attn.qkv.weight.chunk(3)[part], None if bias is None else bias.chunk(3)[part])


def _out_features(module: nn.Module) -> int:
    linears = [m for m in module.modules() if isinstance(m, nn.Linear)]
    return linears[-1].out_features if linears else 0
