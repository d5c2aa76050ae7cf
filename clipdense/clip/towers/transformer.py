"""The block loop that every ViT family shares."""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from clipdense.clip.attention import CLASS_TOKEN_MODES, MODES, Block, Mode, TokenStream, get_mode, plain
from clipdense.clip.towers.base import POOLED, Tower, TowerOutput, TowerRequest, to_map


class BlockHook(Protocol):
    """Sees, and may replace, what flows through a transformer: deep prompts, mask prompts and mask tokens
    are hooks.
    """

    def __call__(self, index: int, stream: TokenStream) -> TokenStream:
        """Called with index -1 on the patch embeddings alone (before class token and positions), with 0 ..
        depth - 1 on what enters that block, and with `depth` on what leaves the last block (in "plain" mode,
        when that runs).

        Patch tokens must stay the last h * w; extra tokens go between the class token and them.
        """


class TransformerTower(Tower):
    """A ViT: `embed`, blocks, `norm_tokens`, `project`; `pool` for the image embedding.

    `pre` is the normed patch map that `project` takes. `keys` are those of the last block.

    Attributes:
        prefix: tokens before the patches.
        class_token: whether the first of them is one.
        pools_class_token: whether the image embedding is project(norm_tokens(class token)).
    """

    has_keys = True
    prefix: int
    class_token: bool = True
    pools_class_token: bool
    grad_checkpointing: bool = False

    @property
    def dense_modes(self) -> tuple[str, ...]:
        """Every registered last-block mode whose tokens the tower has."""
        if self.why_no_dense:
            return ()
        return tuple(mode for mode in MODES if self.class_token or mode not in CLASS_TOKEN_MODES)

    @property
    def blocks(self) -> nn.ModuleList:
        """The transformer blocks, first to last."""
        raise NotImplementedError

    def block(self, index: int) -> Block:
        """The view of one block; negative indices count from the end."""
        raise NotImplementedError

    def embed(self, images: Tensor, hook: BlockHook | None) -> TokenStream:
        """Images -> the stream that enters block 0."""
        raise NotImplementedError

    def norm_tokens(self, x: Tensor) -> Tensor:
        """The final norm of tokens (B, L, C)."""
        raise NotImplementedError

    def project(self, x: Tensor) -> Tensor:
        """Normed tokens (B, L, C) -> joint space (B, L, D)."""
        raise NotImplementedError

    def pool(self, x: Tensor) -> Tensor:
        """Tokens that leave the last block, prefix first (B, prefix + h * w, C) -> image embeddings (B,
        D).
        """
        raise NotImplementedError

    def forward(
        self, images: Tensor, want: TowerRequest = POOLED, hook: BlockHook | None = None
    ) -> TowerOutput:
        """As `Tower.forward`, with one hook between the blocks."""
        self.check(images, want)
        return self.features(images.to(self.dtype), want, hook)

    def features(self, images: Tensor, want: TowerRequest, hook: BlockHook | None = None) -> TowerOutput:
        """All blocks but the last once, the last once for each mode that is wanted; no block beyond the last
        tap.
        """
        last = len(self.blocks) - 1
        whole = want.pre or want.keys or want.pooled or want.dense is not None
        stream, taps = self.embed(images, hook), {}
        for i in range(last if whole or last in want.taps else max(want.taps, default=-1) + 1):
            stream = self._run(plain, i, hook(i, stream) if hook else stream)
            if i in want.taps:
                taps[i] = stream.patches
        out = TowerOutput()
        if whole or last in want.taps:
            stream = hook(last, stream) if hook else stream
            tapped = self._last_block(stream, want, hook, out)
            if tapped is not None:
                taps[last] = tapped
        out.taps = [(to_map(taps[i], stream.grid), self.tap_strides[i]) for i in want.taps]
        return out

    def _last_block(
        self, stream: TokenStream, want: TowerRequest, hook: BlockHook | None, out: TowerOutput
    ) -> Tensor | None:
        """Fill `out` from what enters the last block; returns the patch tokens that leave it, if tapped."""
        last = len(self.blocks) - 1
        left: dict[Mode, TokenStream] = {}

        def leave(name: str) -> TokenStream:
            mode = get_mode(name)  # names can share one
            if mode not in left:
                left[mode] = self._run(mode, last, stream)
                if hook and mode is plain:
                    left[mode] = hook(last + 1, left[mode])
            return left[mode]

        if want.keys:
            block = self.block(last)
            out.keys = to_map(replace(stream, x=block.key(block.normed(stream.x))).patches, stream.grid)
        if want.pooled:
            out.pooled = self.pool(self._without_extra(leave("plain")))
        if want.pre or want.dense is not None:
            tokens = self.norm_tokens(leave(want.dense or "plain").patches)
            if want.pre:
                out.pre = to_map(tokens, stream.grid)
            if want.dense:
                out.dense = to_map(self.project(tokens), stream.grid)
        return leave(want.tap_mode).patches if last in want.taps else None

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute blocks in the backward pass instead of keeping their activations."""
        self.grad_checkpointing = enable

    def _run(self, mode: Mode, index: int, stream: TokenStream) -> TokenStream:
        block = self.block(index)
        if self.grad_checkpointing and self.training:
            x = checkpoint(lambda x: mode(block, replace(stream, x=x)), stream.x, use_reentrant=False)
        else:
            x = mode(block, stream)
        return replace(stream, x=x)

    def _without_extra(self, stream: TokenStream) -> Tensor:
        if stream.x.shape[1] == self.prefix + stream.grid[0] * stream.grid[1]:
            return stream.x
        return torch.cat([stream.x[:, : self.prefix], stream.patches], dim=1)
