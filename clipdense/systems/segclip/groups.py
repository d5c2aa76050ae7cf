"""SegCLIP's semantic groups: learnable centres collect the patches that each of them wins."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import torch
from open_clip.transformer import QuickGELU
from torch import Tensor, nn

__all__ = ["Grouping", "SemanticGroups", "TokenReconstruction", "gumbel_noise"]


@dataclass
class Grouping:
    """Result of `SemanticGroups`.

    Attributes:
        tokens: group tokens Y (B, G, C).
        hard: assignment of patches to groups (B, G, L), one-hot over the groups; in training with the
            gradient of the softmax.
        soft: softmax over the groups (B, G, L).
    """

    tokens: Tensor
    hard: Tensor
    soft: Tensor


class SemanticGroups(nn.Module):
    """Learnable centres that look at the patches by cross-attention, then share the patches among themselves.

    centres q_g: two blocks of q <- q + MHA(q, [q; x]); q <- q + MLP(q)
    Q = LN(q), K = LN(conv(LN(x))), V = conv(LN(x)); the convolutions are 1 x 1 with one group a head
    A = Q K^T; each patch belongs to the group with the largest A, without a scale
    y_g = QuickGELU(MLP(LN(Q_g + mean of V over the patches of g)))

    Source: Luo et al., SegCLIP, ICML 2023, section 3.2.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        centers: int = 8,
        layers: int = 2,
        temperature: float = 0.9,
        mixed_keys: bool = False,
    ) -> None:
        """
        Args:
            width: C of the tokens.
            heads: number of attention heads, and of groups of the convolutions.
            centers: G.
            layers: number of cross-attention blocks.
            temperature: of the Gumbel-softmax in training.
            mixed_keys: keep the published bug that keys and values of a batch of B images are read in another
                layout: token n of all B * (G + L) tokens belongs to image n mod B. It makes no difference
                for one image. The published weights were trained with it, and evaluated with B = 1.
        """
        super().__init__()
        self.temperature = temperature
        self.semantic_center = nn.Parameter(torch.zeros(centers, width))
        nn.init.trunc_normal_(self.semantic_center, std=0.02)
        self.cross_att = nn.ModuleList(_CrossBlock(width, heads, mixed_keys) for _ in range(layers))
        self.cross_ln, self.norm, self.k_ln = (nn.LayerNorm(width) for _ in range(3))
        self.k_conv, self.v_conv = (nn.Conv1d(width, width, 1, groups=heads, bias=False) for _ in range(2))
        self.proj_o = _OutputMLP(width)

    def queries(self, x: Tensor) -> Tensor:
        """Compute Q (B, G, C) from patch tokens x (B, L, C)."""
        q = self.semantic_center.expand(len(x), -1, -1)
        for block in self.cross_att:
            q = block(q, x)
        normed: Tensor = self.cross_ln(q)
        return normed

    def keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Compute K and V (B, L, C) from patch tokens x (B, L, C)."""
        channels_first = self.norm(x).transpose(1, 2)
        k = self.k_ln(self.k_conv(channels_first).transpose(1, 2))
        return k, self.v_conv(channels_first).transpose(1, 2)

    def forward(self, x: Tensor, noise: Tensor | None = None) -> Grouping:
        """Group patch tokens x (B, L, C).

        Args:
            x: the tokens.
            noise: Gumbel noise (B, G, L) of training; None: no noise, and no gradient through the assignment.
        """
        q, (k, v) = self.queries(x), self.keys_values(x)
        scores = q @ k.transpose(1, 2)  # A, (B, G, L)
        soft = scores.softmax(1)
        relaxed = soft if noise is None else ((scores + noise) / self.temperature).softmax(1)
        hard = torch.zeros_like(relaxed).scatter(1, relaxed.argmax(1, keepdim=True), 1.0)
        if noise is not None:
            hard = hard - relaxed.detach() + relaxed  # the value of the first, the gradient of the last
        mean = hard @ v / hard.sum(2, keepdim=True).clamp(min=1)
        return Grouping(self.proj_o(q + mean), hard, soft)


class TokenReconstruction(nn.Module):
    """Tokens of patches from the tokens of their groups: z_l = QuickGELU(sum_g W(hard)_lg y_g).

    Source: Luo et al., SegCLIP, ICML 2023, section 3.3 (reconstruction loss).
    """

    def __init__(self, centers: int = 8) -> None:
        super().__init__()
        self.a_fc = nn.Linear(centers, centers)
        self.act = QuickGELU()

    def forward(self, grouping: Grouping) -> Tensor:
        """Return the tokens (B, L, C)."""
        z: Tensor = self.act(self.a_fc(grouping.hard.transpose(1, 2)) @ grouping.tokens)
        return z


class _OutputMLP(nn.Module):
    """QuickGELU(MLP(LN(x))), with the exact GELU inside the MLP."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.ln = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            OrderedDict(fc1=nn.Linear(width, 4 * width), act=nn.GELU(), fc2=nn.Linear(4 * width, width))
        )
        self.act = QuickGELU()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.act(self.mlp(self.ln(x)))
        return y


class _CrossBlock(nn.Module):
    """q <- q + MHA(LN(q), LN([q; x])); q <- q + MLP(LN(q))."""

    def __init__(self, width: int, heads: int, mixed_keys: bool) -> None:
        super().__init__()
        self.mixed_keys = mixed_keys
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.ln_x, self.ln_k, self.ln_2 = (nn.LayerNorm(width) for _ in range(3))
        self.mlp = nn.Sequential(
            OrderedDict(
                c_fc=nn.Linear(width, 4 * width), gelu=QuickGELU(), c_proj=nn.Linear(4 * width, width)
            )
        )

    def forward(self, q: Tensor, x: Tensor) -> Tensor:
        memory = self.ln_k(torch.cat([q, x], dim=1))
        if self.mixed_keys:
            batch, length, width = memory.shape
            memory = memory.reshape(length, batch, width).transpose(0, 1)
        q = q + self.attn(self.ln_x(q), memory, memory, need_weights=False)[0]
        y: Tensor = q + self.mlp(self.ln_2(q))
        return y


def gumbel_noise(batch: int, centers: int, patches: int, device: torch.device) -> Tensor:
    """Draw standard Gumbel noise (B, G, L)."""
    exponential = torch.empty(batch, centers, patches, device=device).exponential_()
    return -exponential.log()
