"""Visual prompt tuning (VPT): learned tokens of a ViT."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from clipdense.clip.attention import TokenStream
from clipdense.clip.towers import BlockHook, Tower, TransformerTower

__all__ = ["VisualPrompts", "chain_hooks", "convert_vpt"]


class VisualPrompts(nn.Module):
    """Learned tokens between the class token and the patches of a ViT.

    Shallow: n tokens enter the first block, without positions. Deep: before every later block, the n outputs
    of the tokens are replaced by new learned tokens. With a projection, tokens have d' channels and one
    linear layer maps all of them to the tower's width. Dense maps and pooled embeddings leave them out.

    In CLIP's ViTs the tokens enter after ``ln_pre``.

    Attributes:
        prompt_embeddings: (1, n, d'), tokens of the first block.
        deep_prompt_embeddings: (L - 1, n, d'), tokens of the later blocks; None for shallow prompts.
        prompt_proj: the projection d' -> d; None without one.

    Source: Jia et al., Visual Prompt Tuning, ECCV 2022, section 3.2.
    """

    def __init__(
        self,
        count: int,
        width: int,
        blocks: int,
        *,
        patch_size: int = 16,
        deep: bool = False,
        project: int = 0,
        dropout: float = 0.0,
    ) -> None:
        """
        Args:
            count: n, number of tokens; at least 1.
            width: d of the tower's tokens.
            blocks: L of the tower.
            patch_size: side of a patch in pixels, which the initial range of the tokens depends on.
            deep: whether every block has its own tokens.
            project: d'; 0: no projection, d' = d.
            dropout: dropout rate of the tokens.

        Raises:
            ValueError: If there are no tokens.
        """
        super().__init__()
        if count < 1:
            raise ValueError(f"visual prompts need at least 1 token, not {count}")
        dim = project or width
        self.count = count
        self.prompt_embeddings = nn.Parameter(torch.empty(1, count, dim))
        self.deep_prompt_embeddings = nn.Parameter(torch.empty(blocks - 1, count, dim)) if deep else None
        self.prompt_proj = nn.Linear(project, width) if project else None
        self.dropout = nn.Dropout(dropout)
        bound = math.sqrt(6 / (3 * patch_size**2 + dim))
        for tokens in (self.prompt_embeddings, self.deep_prompt_embeddings):
            if tokens is not None:
                nn.init.uniform_(tokens, -bound, bound)
        if self.prompt_proj is not None:
            nn.init.kaiming_normal_(self.prompt_proj.weight, a=0, mode="fan_out")

    @classmethod
    def of(
        cls, tower: Tower, count: int, *, deep: bool = False, project: int = 0, dropout: float = 0.0
    ) -> VisualPrompts:
        """Create new prompts for a tower; arguments as of the constructor.

        Raises:
            ValueError: If the tower is not a ViT.
        """
        if not isinstance(tower, TransformerTower):
            raise tower.cannot("visual prompts", "only ViTs have tokens")
        return cls(
            count,
            tower.tap_channels[0],
            len(tower.blocks),
            patch_size=tower.patch_size,
            deep=deep,
            project=project,
            dropout=dropout,
        )

    def check(self, tower: Tower) -> None:
        """Check loaded prompts against a tower.

        Raises:
            ValueError: If the tower is not a ViT, or has another width or number of blocks.
        """
        if not isinstance(tower, TransformerTower):
            raise tower.cannot("visual prompts", "only ViTs have tokens")
        tokens, deep = self.prompt_embeddings, self.deep_prompt_embeddings
        width = tokens.shape[2] if self.prompt_proj is None else self.prompt_proj.out_features
        if width != tower.tap_channels[0]:
            raise tower.cannot(
                f"visual prompts of width {width}", f"its tokens have {tower.tap_channels[0]} channels"
            )
        if deep is not None and len(deep) != len(tower.blocks) - 1:
            raise tower.cannot(
                f"deep visual prompts of {len(deep) + 1} blocks", f"it has {len(tower.blocks)} blocks"
            )

    def tokens(self, index: int) -> Tensor | None:
        """Return the tokens (n, d) that enter a block; None if the block gets those of the previous one."""
        if index == 0:
            tokens = self.prompt_embeddings[0]
        elif self.deep_prompt_embeddings is not None and 0 < index <= len(self.deep_prompt_embeddings):
            tokens = self.deep_prompt_embeddings[index - 1]
        else:
            return None
        projected: Tensor = tokens if self.prompt_proj is None else self.prompt_proj(tokens)
        return projected

    def forward(self, index: int, stream: TokenStream) -> TokenStream:
        """Insert or replace the tokens; see `BlockHook`."""
        tokens = self.tokens(index)
        if tokens is None:
            return stream
        tokens = self.dropout(tokens.expand(len(stream.x), -1, -1)).to(stream.x.dtype)
        patches = stream.patches
        before = stream.x.shape[1] - patches.shape[1] - (0 if index == 0 else self.count)
        return replace(stream, x=torch.cat([stream.x[:, :before], tokens, patches], dim=1))


def chain_hooks(*hooks: BlockHook | None) -> BlockHook | None:
    """Combine block hooks, called in the given order; None if there is none."""
    given = [hook for hook in hooks if hook is not None]
    if len(given) < 2:
        return given[0] if given else None

    def call(index: int, stream: TokenStream) -> TokenStream:
        for hook in given:
            stream = hook(index, stream)
        return stream

    return call


_VPT_NAMES = {
    "attention_norm.": "norm1.",
    "ffn_norm.": "norm2.",
    "attn.out.": "attn.proj.",
    "ffn.": "mlp.",
}


def convert_vpt(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Convert a file of VPT's published code, an ImageNet ViT with prompts.

    Args:
        state: tensors under the published keys, ``transformer.*`` and ``head.*``.

    Returns:
        The ViT under timm's keys, with its classifier, and the state of its `VisualPrompts`. Unknown keys are
        kept, so that strict loading reports them.
    """
    vit: dict[str, Tensor] = {}
    prompts: dict[str, Tensor] = {}
    fused: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        name = key.removeprefix("transformer.")
        if "prompt" in name:
            prompts[name] = value
        elif name.startswith("embeddings."):
            name = name.removeprefix("embeddings.").replace("patch_embeddings.", "patch_embed.proj.")
            vit[name.replace("position_embeddings", "pos_embed")] = value
        elif name.startswith("encoder.layer."):
            name = name.replace("encoder.layer.", "blocks.")
            for theirs, ours in _VPT_NAMES.items():
                name = name.replace(f".{theirs}", f".{ours}")
            block, _, part = name.partition(".attn.")
            projection, _, kind = part.partition(".")
            if projection in ("query", "key", "value"):
                fused.setdefault(f"{block}.attn.qkv.{kind}", {})[projection] = value
            else:
                vit[name] = value
        else:
            vit[name.replace("encoder.encoder_norm.", "norm.")] = value
    for name, parts in fused.items():
        vit[name] = torch.cat([parts[part] for part in ("query", "key", "value")])
    return vit, prompts
