"""Block loop of all ViT families."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from clipdense.clip.attention import (
    MODES,
    AttentionParameters,
    Block,
    History,
    Mode,
    TokenStream,
    get_mode,
)
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


class BlockRunner(Protocol):
    """Runner of a block whose parameters are not all on this device between its runs (FSDP)."""

    def __call__(self, block: nn.Module, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Return ``function(x)``, computed while all parameters of the block are available."""


class TransformerTower(Tower):
    """A ViT: `embed`, blocks, `norm_tokens`, `project`; `pool` for the image embedding.

    `pre` is the normed patch map, the input of `project`. `keys` are the keys of the last block.

    Attributes:
        patch_size: side of a patch in pixels; `stride` equals it unless `set_patch_stride` changed it.
        prefix: number of tokens before the patches.
        class_token: whether the first of them is a class token.
        pools_class_token: whether the image embedding is project(norm_tokens(class token)).
        pools_regions: whether `embed_regions` pools with weights (MAP heads).
        grad_checkpointing: see `set_grad_checkpointing`.
        block_runner: runs every block if it is set. It cannot run modes that read other blocks.
    """

    has_keys = True
    patch_size: int
    prefix: int
    class_token: bool = True
    pools_class_token: bool
    pools_regions: bool = False
    grad_checkpointing: bool = False
    block_runner: BlockRunner | None = None

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

    def set_patch_stride(self, stride: int) -> None:
        """Let patches overlap: a smaller stride of the patch convolution gives a larger map.

        The images are extended by half the overlap on each side, with copies of their border. A cell of the
        map is therefore the middle of its patch, the map has H // stride rows, and each patch keeps the
        position of its centre. (PACL and others do not extend the image: the map has (H - patch) // stride +
        1 rows and covers the image without its border.) The number of tokens grows with
        (patch size / stride)^2, and the cost of the attention with the square of that.

        Args:
            stride: in pixels, 1 to the patch size. The patch size restores the plain tower.

        Raises:
            ValueError: If the stride is larger than the patch size, or smaller than 1.

        Source: Mukhoti et al., PACL, CVPR 2023, section 4 (inference); Amir et al., Deep ViT Features, 2021.
        """
        if not 1 <= stride <= self.patch_size:
            raise self.cannot(
                f"a patch stride of {stride} pixels", f"its patches allow 1 to {self.patch_size}"
            )
        self.stride = stride
        self.tap_strides = dict.fromkeys(self.tap_strides, stride)

    @property
    def smallest_side(self) -> int:
        """Side of a patch in pixels."""
        return self.patch_size

    def convolve_patches(self, images: Tensor, convolution: nn.Conv2d) -> Tensor:
        """Embed the patches of images (B, 3, H, W) as a map (B, C, H // stride, W // stride)."""
        overlap = self.patch_size - self.stride
        if not overlap:
            patches: Tensor = convolution(images)
            return patches
        before, after = overlap // 2, overlap - overlap // 2
        extended = F.pad(images, (before, after, before, after), mode="replicate")
        return F.conv2d(extended, convolution.weight, convolution.bias, stride=self.stride)

    def norm_tokens(self, x: Tensor) -> Tensor:
        """Apply the final norm to tokens (B, L, C)."""
        raise NotImplementedError

    def project(self, x: Tensor) -> Tensor:
        """Project normed tokens (B, L, C) to the joint space (B, L, D)."""
        raise NotImplementedError

    def block_mode(self, mode: str) -> str:
        """Return the mode in which the last block runs for a dense mode; MAP heads run it in "plain"."""
        return mode

    def localize(self, x: Tensor, mode: str) -> Tensor:
        """Change normed patch tokens (B, N, C) before `project`; MAP heads run here, on every patch."""
        return x

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
        keep, streams = any(mode.reads_history for mode in self._modes(request)), []
        for i in range(last if whole or last in request.taps else max(request.taps, default=-1) + 1):
            stream = hook(i, stream) if hook else stream
            if keep:
                streams.append(stream)
            stream = self._run(plain, i, stream)
            if i in request.taps:
                taps[i] = stream
        out = TowerOutput()
        if whole or last in request.taps:
            stream = hook(last, stream) if hook else stream
            history = self._history([*streams, stream]) if keep else None
            tapped = self._last_block(stream, request, hook, out, history)
            if tapped is not None:
                taps[last] = tapped
        out.taps = [(to_map(taps[i].patches, taps[i].grid), self.tap_strides[i]) for i in request.taps]
        return out

    def history(self, images: Tensor, hook: BlockHook | None = None) -> History:
        """Run all blocks except the last, for methods that run the last block several times.

        Args:
            images: (B, 3, H, W), normalised.
            hook: called between the blocks.
        """
        self.check(images, POOLED)
        stream, plain, streams = self.embed(images.to(self.dtype), hook), get_mode("plain"), []
        for i in range(len(self.blocks)):
            streams.append(hook(i, stream) if hook else stream)
            if i < len(self.blocks) - 1:
                stream = self._run(plain, i, streams[-1])
        return self._history(streams)

    def dense(
        self,
        history: History,
        mode: str,
        guidance: Tensor | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> Tensor:
        """Run the last block after a history: `TowerOutput.dense` (B, D, h, w) of a mode.

        Args:
            history: result of `history`.
            mode: last-block mode.
            guidance: see `TowerRequest.guidance`.
            options: see `TowerRequest.options`.
        """
        if mode not in self.dense_modes:
            raise self.cannot(f"dense '{mode}'", self.why_no_dense or f"its modes are {self.dense_modes}")
        run = get_mode(self.block_mode(mode))
        stream = run(history.block, history.stream, guidance, history=history, options=options)
        return self.joint_map(stream, mode)

    def joint_map(self, stream: TokenStream, mode: str = "plain") -> Tensor:
        """Norm and project the patches of a stream that leaves the last block: (B, D, h, w)."""
        tokens = self.localize(self.norm_tokens(stream.patches), mode)
        return to_map(self.project(tokens), stream.grid)

    def _history(self, streams: list[TokenStream]) -> History:
        return History([self.block(i) for i in range(len(self.blocks))], streams)

    def _last_block(
        self,
        stream: TokenStream,
        request: TowerRequest,
        hook: BlockHook | None,
        out: TowerOutput,
        history: History | None,
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
                options = request.options if name in (request.dense, request.tap_mode) else None
                results[mode.name] = self._run(mode, last, stream, guidance, history, options)
                if hook and mode.name == "plain":
                    results[mode.name] = hook(last + 1, results[mode.name])
            return results[mode.name]

        if request.keys:
            block, run_block = self.block(last), self.block_runner or _run_directly
            keys = run_block(self.blocks[last], lambda x: block.key(block.normed(x)), stream.x)
            out.keys = to_map(replace(stream, x=keys).patches, stream.grid)
        if request.pooled:
            out.pooled = self.pool(self._without_extra(run("plain")))
        if request.pre or request.dense is not None:
            dense = run(self.block_mode(request.dense or "plain"))
            tokens = self.norm_tokens(dense.patches)
            if request.pre:
                out.pre = to_map(tokens, dense.grid)
            if request.dense:
                out.dense = to_map(self.project(self.localize(tokens, request.dense)), dense.grid)
        return run(request.tap_mode) if last in request.taps else None

    def check_guidance(self, request: TowerRequest) -> None:
        """Raise ValueError unless guidance and options fit the requested last-block modes."""
        modes = self._modes(request)
        guided = [mode for mode in modes if mode.guidance]
        if request.guidance is not None and not modes:
            raise self.cannot("an output with guidance", "no dense map or last-block tap is requested")
        for mode in guided or modes[:1]:
            mode.check_guidance(request.guidance)
        if request.options:
            if not modes:
                raise self.cannot("an output with options", "no dense map or last-block tap is requested")
            for mode in modes:
                mode.check_options(request.options)

    def _modes(self, request: TowerRequest) -> list[Mode]:
        """Return the last-block modes of the dense map and of the last block's tap."""
        names = [request.dense] if request.dense is not None else ["plain"] if request.pre else []
        if len(self.blocks) - 1 in request.taps:
            names.append(request.tap_mode)
        return [get_mode(name) for name in names]

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks in the backward pass instead of storing their activations."""
        self.grad_checkpointing = enable

    def _run(
        self,
        mode: Mode,
        index: int,
        stream: TokenStream,
        guidance: Tensor | None = None,
        history: History | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> TokenStream:
        block, leaving = self.block(index), stream

        def call(x: Tensor) -> Tensor:
            nonlocal leaving
            leaving = mode(block, replace(stream, x=x), guidance, history=history, options=options)
            return leaving.x

        def recomputed_call(x: Tensor) -> Tensor:
            y: Tensor = checkpoint(call, x, use_reentrant=False)
            return y

        if mode.reads_history:
            if self.block_runner is not None:
                raise self.cannot(f"mode '{mode.name}' in training", "its parameters are sharded")
            return mode(block, stream, guidance, history=history, options=options)
        function = recomputed_call if self.grad_checkpointing and self.training else call
        x = (self.block_runner or _run_directly)(self.blocks[index], function, stream.x)
        return replace(leaving, x=x)

    def _without_extra(self, stream: TokenStream) -> Tensor:
        if stream.x.shape[1] == self.prefix + stream.grid[0] * stream.grid[1]:
            return stream.x
        return torch.cat([stream.x[:, : self.prefix], stream.patches], dim=1)


def _run_directly(block: nn.Module, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return function(x)
