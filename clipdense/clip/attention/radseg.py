"""RADSeg's last block: values are averaged by the similarity of the attention's own result."""

from __future__ import annotations

from dataclasses import replace

import torch.nn.functional as F
from torch import Tensor

from clipdense.clip.attention.block import Block, TokenStream
from clipdense.clip.attention.mode import dense_mode
from clipdense.clip.attention.proxy import positive_softmax


@dense_mode("radseg")
def radseg(block: Block, stream: TokenStream, *, temperature: float = 0.1, full: bool = False) -> TokenStream:
    """Attend a second time, by the cosines of the result o of the ordinary attention.

    A = softmax(cos(o, o) / temperature) per head, without negative cosines; y = out(A v).

    Args:
        block: view of the last block.
        stream: tokens that enter it.
        temperature: see above.
        full: keep residual and MLP.

    Source: RADSeg, self-correlating recursive attention.
    """
    u = block.normed(stream.x)
    projections = block.qkv(u)
    o = block.out(block.attend(*projections, stream))
    o = o.reshape(*o.shape[:2], block.heads, -1).transpose(1, 2)
    _, _, v = block.split_heads(*projections, stream)
    y = block.out((cosine_attention(o, temperature) @ v).transpose(1, 2).flatten(2))
    if not full:
        return replace(stream, x=y)
    x = stream.x + y
    return replace(stream, x=x + block.mlp(x))


def cosine_attention(x: Tensor, temperature: float, *, centre: bool = False) -> Tensor:
    """Compute softmax(S / temperature) of the cosines S of tokens (..., N, C), without negative entries.

    Args:
        x: tokens.
        temperature: see above.
        centre: subtract the mean of S first.
    """
    e = F.normalize(x, dim=-1)
    similarity = e @ e.transpose(-2, -1)
    if centre:
        similarity = similarity - similarity.mean((-2, -1), keepdim=True)
    return positive_softmax(similarity / temperature)
