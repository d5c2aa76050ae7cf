"""Block loop of all ViT families."""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from clipdense.clip.attention import MODES, AttentionParameters, Block, Mode, TokenStream, get_mode
from clipdense.clip.towers.base import POOLED, Tower, TowerOutput, TowerRequest, to_map


class BlockHook(Protocol):
    """Hook between blocks that may replace the token stream (deep prompts, mask prompts, mask tokens)."""

    def __call__(self, index: int, stream: TokenStream) -> TokenStream:
        """Return the stream that replaces the given one.

        Patch tokens must stay the last h * w; extra tokens go between the class token and the patches.

        Args:
            index: -1 for the patch embeddings (before class token and positions), 0 .. depth - 1 for the
                input of that block, depth for the output of the last block (only if it runs in "plain"
                mode).
            stream: tokens at that place.
        """


class TransformerTower(Tower):
    """A ViT: `embed`, blocks, `norm_tokens`, `project`; `pool` for the image embedding.

    `pre` is the normed patch map, the input of `project`. `keys` are the keys of the last block.

    Attributes:
        prefix: number of tokens before the patches.
        class_token: whether the first of them is a class token.
        pools_class_token: whether the image embedding is project(norm_tokens(class token)).
        grad_checkpointing: see `set_grad_checkpointing`.
    """

    has_keys = True
    prefix: int
    class_token: bool = True
    pools_class_token: bool
    grad_checkpointing: bool = False

    @property
    def dense_modes(self) -> tuple[str, ...]:
        """Registered last-block modes that the tower offers; a tower without class token lacks some."""
        if self.why_no_dense:
            return ()
        return tuple(name for name, mode in MODES.items() if self.class_token or not mode.class_token)

    @property
    def blocks(self) -> nn.ModuleList:
        """Transformer blocks, first to last."""
        raise NotImplementedError

    def block(self, index: int) -> Block:
        """Return the view of one block; negative indices count from the end."""
        raise NotImplementedError

    def attentions(self) -> tuple[AttentionParameters, ...]:
        """Return the attention projections of the blocks, first to last."""
        return tuple(self.block(i).attention_parameters() for i in range(len(self.blocks)))

    def embed(self, images: Tensor, hook: BlockHook | None) -> TokenStream:
        """Embed images as the token stream that enters block 0."""
        raise NotImplementedError

    def norm_tokens(self, x: Tensor) -> Tensor:
        """Apply the final norm to tokens (B, L, C)."""
        raise NotImplementedError

    def project(self, x: Tensor) -> Tensor:
        """Project normed tokens (B, L, C) to the joint space (B, L, D)."""
        raise NotImplementedError

    def pool(self, x: Tensor) -> Tensor:
        """Pool the output of the last block (B, prefix + h * w, C) to image embeddings (B, D)."""
        raise NotImplementedError

    def forward(
        self, images: Tensor, request: TowerRequest = POOLED, hook: BlockHook | None = None
    ) -> TowerOutput:
        """Compute the requested outputs; see `Tower.forward`.

        Args:
            images: (B, 3, H, W), normalised.
            request: outputs to compute.
            hook: called between the blocks.
        """
        self.check(images, request)
        return self.features(images.to(self.dtype), request, hook)

    def features(self, images: Tensor, request: TowerRequest, hook: BlockHook | None = None) -> TowerOutput:
        """Run all blocks except the last once, and the last block once for each requested mode.

        Blocks after the last tap do not run if only taps are requested.
        """
        last = len(self.blocks) - 1
        whole = request.pre or request.keys or request.pooled or request.dense is not None
        stream, plain = self.embed(images, hook), get_mode("plain")
        taps: dict[int, TokenStream] = {}
        for i in range(last if whole or last in request.taps else max(request.taps, default=-1) + 1):
            stream = self._run(plain, i, hook(i, stream) if hook else stream)
            if i in request.taps:
                taps[i] = stream
        out = TowerOutput()
        if whole or last in request.taps:
            stream = hook(last, stream) if hook else stream
            tapped = self._last_block(stream, request, hook, out)
            if tapped is not None:
                taps[last] = tapped
        out.taps = [(to_map(taps[i].patches, taps[i].grid), self.tap_strides[i]) for i in request.taps]
        return out

    def _last_block(
        self, stream: TokenStream, request: TowerRequest, hook: BlockHook | None, out: TowerOutput
    ) -> TokenStream | None:
        """Fill `out` from the input of the last block.

        Returns:
            The stream that leaves the last block in the tap mode; None if the last block is not tapped.
        """
        last = len(self.blocks) - 1
        results: dict[str, TokenStream] = {}

        def run(name: str) -> TokenStream:
            mode = get_mode(name)
            if mode.name not in results:  # several names can share a mode
                guidance = request.guidance if mode.guidance else None
                results[mode.name] = self._run(mode, last, stream, guidance)
                if hook and mode.name == "plain":
                    results[mode.name] = hook(last + 1, results[mode.name])
            return results[mode.name]

        if request.keys:
            block = self.block(last)
            out.keys = to_map(replace(stream, x=block.key(block.normed(stream.x))).patches, stream.grid)
        if request.pooled:
            out.pooled = self.pool(self._without_extra(run("plain")))
        if request.pre or request.dense is not None:
            dense = run(request.dense or "plain")
            tokens = self.norm_tokens(dense.patches)
            if request.pre:
                out.pre = to_map(tokens, dense.grid)
            if request.dense:
                out.dense = to_map(self.project(tokens), dense.grid)
        return run(request.tap_mode) if last in request.taps else None

    def check_guidance(self, request: TowerRequest) -> None:
        """Raise ValueError unless guidance is given exactly if a requested last-block mode takes it."""
        names = [request.dense] if request.dense is not None else ["plain"] if request.pre else []
        if len(self.blocks) - 1 in request.taps:
            names.append(request.tap_mode)
        modes = [get_mode(name) for name in names]
        guided = [mode for mode in modes if mode.guidance]
        if request.guidance is not None and not modes:
            raise self.cannot("an output with guidance", "no dense map or last-block tap is requested")
        for mode in guided or modes[:1]:
            mode.check_guidance(request.guidance)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks in the backward pass instead of storing their activations."""
        self.grad_checkpointing = enable

    def _run(
        self, mode: Mode, index: int, stream: TokenStream, guidance: Tensor | None = None
    ) -> TokenStream:
        block = self.block(index)
        if not (self.grad_checkpointing and self.training):
            return mode(block, stream, guidance)
        result: TokenStream = checkpoint(
            lambda x: mode(block, replace(stream, x=x), guidance), stream.x, use_reentrant=False
        )
        return result

    def _without_extra(self, stream: TokenStream) -> Tensor:
        if stream.x.shape[1] == self.prefix + stream.grid[0] * stream.grid[1]:
            return stream.x
        return torch.cat([stream.x[:, : self.prefix], stream.patches], dim=1)
