"""The block loop that every ViT family shares."""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..attention import MODES, Block, Mode, TokenStream, get_mode, plain
from .base import POOLED, Tower, TowerOutput, Want, to_map


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
    """

    has_keys = True
    prefix: int
    grad_checkpointing: bool = False

    @property
    def dense_modes(self) -> tuple[str, ...]:
        """Every registered last-block mode."""
        return () if self.why_no_dense else tuple(MODES)

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

    def forward(self, images: Tensor, want: Want = POOLED, hook: BlockHook | None = None) -> TowerOutput:
        """As `Tower.forward`, with one hook between the blocks."""
        self.check(images, want)
        return self.features(images.to(self.dtype), want, hook)

    def features(self, images: Tensor, want: Want, hook: BlockHook | None = None) -> TowerOutput:
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
            taps[last] = self._last_block(stream, want, hook, out)
        out.taps = [(to_map(taps[i], stream.grid), self.tap_strides[i]) for i in want.taps]
        return out

    def _last_block(
        self, stream: TokenStream, want: Want, hook: BlockHook | None, out: TowerOutput
    ) -> Tensor:
        """Fill `out` from what enters the last block; returns the patch tokens that leave it."""
        last = len(self.blocks) - 1
        final = stream
        if want.keys:
            block = self.block(last)
            out.keys = to_map(replace(stream, x=block.key(block.normed(stream.x))).patches, stream.grid)
        mapped = want.pre or want.dense is not None
        mode = want.dense or "plain"
        if want.pooled or last in want.taps or (mapped and mode == "plain"):
            final = self._run(plain, last, stream)
            final = hook(last + 1, final) if hook else final
        if want.pooled:
            out.pooled = self.pool(self._without_extra(final))
        if mapped:
            mapped_stream = final if mode == "plain" else self._run(get_mode(mode), last, stream)
            tokens = self.norm_tokens(mapped_stream.patches)
            if want.pre:
                out.pre = to_map(tokens, stream.grid)
            if want.dense:
                out.dense = to_map(self.project(tokens), stream.grid)
        return final.patches

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
