"""DenseCLIP's context decoder, of post-model and pre-model prompting."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["ContextDecoder"]


class ContextDecoder(nn.Module):
    """Transformer decoder from queries and visual tokens m to a vector for each query.

    In post-model prompting, queries are text embeddings t and the result is a change of them. In pre-model
    prompting, queries are learned and the results are the contexts of the class names.

    q = Linear(LN(t)), m' = LN(Linear(LN(m))). Every layer applies self-attention of q, cross-attention to m'
    and an MLP, pre-norm. delta = Linear(LN(q)). There are no position embeddings, as the dense map has its
    own.

    Source: Rao et al., DenseCLIP, CVPR 2022, section 3.3.
    """

    def __init__(
        self,
        dim: int,
        *,
        width: int = 256,
        heads: int = 4,
        layers: int = 3,
        dropout: float = 0.1,
        out_dim: int = 0,
    ) -> None:
        """
        Args:
            dim: D, of text embeddings and visual tokens.
            width: width of the decoder, a multiple of ``heads``.
            heads: number of heads of each attention.
            layers: number of decoder layers.
            dropout: dropout rate after attentions and in the MLPs.
            out_dim: dimension of the results; 0: D.

        Raises:
            ValueError: If ``width`` is not a multiple of ``heads``.
        """
        super().__init__()
        if width % heads:
            raise ValueError(
                f"the context decoder's WIDTH {width} is not a multiple of its HEADS {heads} "
                "(MODEL.LANGUAGE.CONTEXT_DECODER, MODEL.PROMPT.PRE_MODEL)"
            )
        self.heads = heads
        self.memory_proj = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, width), nn.LayerNorm(width))
        self.text_proj = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, width))
        self.decoder = nn.ModuleList(_DecoderLayer(width, heads, dropout) for _ in range(layers))
        self.out_proj = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, out_dim or dim))
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, text: Tensor, memory: Tensor) -> Tensor:
        """Map queries (B, K, D) and visual tokens (B, N, D) to delta (B, K, out_dim)."""
        queries, memory = self.text_proj(text), self.memory_proj(memory)
        for layer in self.decoder:
            queries = layer(queries, memory)
        delta: Tensor = self.out_proj(queries)
        return delta


class _DecoderLayer(nn.Module):
    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.self_attn = _Attention(width, heads, dropout)
        self.cross_attn = _Attention(width, heads, dropout)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Dropout(dropout), nn.Linear(4 * width, width)
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        u = self.norm1(x)
        x = x + self.self_attn(u, u)
        x = x + self.cross_attn(self.norm2(x), memory)
        y: Tensor = x + self.dropout(self.mlp(self.norm3(x)))
        return y


class _Attention(nn.Module):
    """Multi-head attention without biases of q, k and v."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.proj = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        q, k, v = (
            y.unflatten(2, (self.heads, -1)).transpose(1, 2)
            for y in (self.q_proj(x), self.k_proj(memory), self.v_proj(memory))
        )
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        z: Tensor = self.dropout(self.proj(y))
        return z
