"""The ordinary last block, and the modes without attention."""

from __future__ import annotations

from dataclasses import replace

from clipdense.clip.attention.block import Block, TokenStream
from clipdense.clip.attention.mode import dense_mode


@dense_mode("plain")
def plain(block: Block, stream: TokenStream) -> TokenStream:
    """Run the block as CLIP was trained."""
    x = stream.x
    x = x + block.out(block.attend(*block.qkv(block.normed(x)), stream))
    return replace(stream, x=x + block.mlp(x))


@dense_mode("value", "clipself", "maskclip")
def value(block: Block, stream: TokenStream) -> TokenStream:
    """Let each token attend to itself only: x + out(v), then the MLP. Residual, inner norm and MLP stay.

    Source: MaskCLIP (Zhou et al., ECCV 2022); CLIPSelf (Wu et al., ICLR 2024) uses it for EVA's blocks too,
        which have an inner norm before the projection.
    """
    x = stream.x
    x = x + block.out(block.value(block.normed(x)))
    return replace(stream, x=x + block.mlp(x))


@dense_mode("catseg", class_token=True)
def catseg(block: Block, stream: TokenStream) -> TokenStream:
    """Run the mode `value` with the class token as the residual of every token.

    Source: the released code of CAT-Seg (Cho et al., CVPR 2024).
    """
    x = stream.x[:, :1] + block.out(block.value(block.normed(stream.x)))
    return replace(stream, x=x + block.mlp(x))
