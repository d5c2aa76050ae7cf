"""Contexts of class names that depend on the image: CoCoOp, DenseCLIP's pre-model prompting, ICPC.

The text tower runs once for every image and class.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipdense.clip.context_decoder import ContextDecoder
from clipdense.clip.prompts import ClassPrompts, ContextPrompts

__all__ = ["ConditionalPrompts", "InstancePrompts", "PreModelPrompts", "alignment_loss"]


class ConditionalPrompts(ContextPrompts):
    """CoCoOp: generic contexts, all shifted by one vector that a small network computes from the image.

    context_i = contexts + meta_net(g_i / |g_i|)

    Source: Zhou et al., Conditional Prompt Learning for Vision-Language Models (CoCoOp), CVPR 2022, section
        3.2.
    """

    image_dependent = True

    def __init__(
        self,
        n_ctx: int,
        width: int,
        embed_dim: int,
        std: float = 0.02,
        *,
        hidden: int = 0,
        position: str = "end",
        full_stop: bool = True,
    ) -> None:
        """
        Args:
            n_ctx, width, std, position, full_stop: see `ContextPrompts`.
            embed_dim: D of the image embeddings.
            hidden: hidden width of the network; 0: D / 16, at least 1 (published).
        """
        super().__init__(n_ctx, width, std, position=position, full_stop=full_stop)
        self.embed_dim = embed_dim
        hidden = hidden or max(1, embed_dim // 16)
        layers = {
            "linear1": nn.Linear(embed_dim, hidden),
            "relu": nn.ReLU(),
            "linear2": nn.Linear(hidden, width),
        }
        self.meta_net = nn.Sequential(OrderedDict(layers))

    def bias(self, g: Tensor) -> Tensor:
        """Compute the shift of the contexts (B, C) from image embeddings (B, D)."""
        shift: Tensor = self.meta_net(F.normalize(g, dim=-1))
        return shift

    def contexts_of(self, names: Sequence[str], g: Tensor | None = None, z: Tensor | None = None) -> Tensor:
        """Return the contexts (B, N, C) of each image."""
        return self.contexts + self.bias(_image(g))[:, None]


class PreModelPrompts(ClassPrompts):
    """Pre-model prompting: a decoder turns learned queries q and the image into the contexts v.

    v = decoder(q, [g; z]); without a dense map, the image embedding g is the only visual token.

    Attributes:
        queries: q, (N, D).

    Source: Rao et al., DenseCLIP, CVPR 2022, section 3.3, equation 3. The published code does not contain it.
    """

    image_dependent = True
    reads_map = True

    def __init__(
        self,
        n_ctx: int,
        width: int,
        embed_dim: int,
        *,
        decoder_width: int = 256,
        heads: int = 4,
        layers: int = 3,
        dropout: float = 0.1,
        position: str = "end",
        full_stop: bool = False,
    ) -> None:
        """
        Args:
            n_ctx, position, full_stop: see `ClassPrompts`.
            width: C of the text tower's tokens.
            embed_dim: D of the joint space.
            decoder_width, heads, layers, dropout: sizes of the decoder, see `ContextDecoder`.
        """
        super().__init__(n_ctx, position=position, full_stop=full_stop)
        self.width, self.embed_dim = width, embed_dim
        self.queries = nn.Parameter(torch.zeros(n_ctx, embed_dim))
        nn.init.trunc_normal_(self.queries, std=1.0)
        self.decoder = ContextDecoder(
            embed_dim, width=decoder_width, heads=heads, layers=layers, dropout=dropout, out_dim=width
        )

    def contexts_of(self, names: Sequence[str], g: Tensor | None = None, z: Tensor | None = None) -> Tensor:
        """Return the contexts (B, N, C) of each image."""
        memory = _image(g)[:, None]
        if z is not None:
            memory = torch.cat([memory, z.flatten(2).transpose(1, 2)], dim=1)
        contexts: Tensor = self.decoder(self.queries.expand(len(memory), -1, -1), memory)
        return contexts


class InstancePrompts(ContextPrompts):
    """ICPC's instance-conditioned prompts, experimental: [p, I, name] with I = projection(g).

    p are generic contexts, I are tokens of the image. The paper's code is not published; the number of tokens
    and the projection are ours. `alignment_loss` is its loss.

    Source: Yu et al., ICPC: Instance-Conditioned Prompting with Contrastive Learning for Semantic
        Segmentation, arXiv 2308.07078, section 3.2.
    """

    image_dependent = True

    def __init__(
        self,
        n_ctx: int,
        width: int,
        embed_dim: int,
        std: float = 1.0,
        *,
        instance_tokens: int = 1,
        position: str = "end",
        full_stop: bool = False,
    ) -> None:
        """
        Args:
            n_ctx, width, std, position, full_stop: see `ContextPrompts`; ``n_ctx`` counts p.
            embed_dim: D of the image embeddings.
            instance_tokens: number of tokens I.
        """
        super().__init__(n_ctx, width, std, position=position, full_stop=full_stop)
        self.embed_dim = embed_dim
        self.length = n_ctx + instance_tokens
        self.projection = nn.Linear(embed_dim, instance_tokens * width)

    def contexts_of(self, names: Sequence[str], g: Tensor | None = None, z: Tensor | None = None) -> Tensor:
        """Return [p, I] (B, N + n_I, C) of each image."""
        instance = self.projection(F.normalize(_image(g), dim=-1)).unflatten(1, (-1, self.contexts.shape[2]))
        return torch.cat([self.contexts.expand(len(instance), -1, -1), instance], dim=1)


def alignment_loss(scores: Tensor, labels: Tensor, ignore_label: int = -1) -> Tensor:
    """Compute a contrastive loss from texts to pixels (or images), experimental.

    For every image and class that occurs in it, the loss is -log of the share of exp(score) that lies on the
    pixels of the class. It complements the cross-entropy over classes, which contrasts texts for each pixel.
    ICPC describes such a loss; its exact form is not published, this one is ours.

    Args:
        scores: (B, K, N), cosines divided by the temperature; N pixels of an image (or the images of a batch,
            with B = 1).
        labels: (B, N) int64 classes; ``ignore_label`` and other values outside 0 .. K - 1 are left out.
        ignore_label: see ``labels``.

    Returns:
        A scalar; 0 if no pixel has a class.

    Source: Yu et al., ICPC, arXiv 2308.07078, section 3.3 (align-guided contrastive loss).
    """
    known = (labels != ignore_label) & (labels >= 0) & (labels < scores.shape[1])
    classes = torch.arange(scores.shape[1], device=scores.device)
    members = (labels[:, None] == classes[None, :, None]) & known[:, None]  # (B, K, N)
    values = scores.float().masked_fill(~known[:, None], -torch.inf)
    occurs = members.any(2)
    if not occurs.any():
        return scores.sum() * 0.0
    inside = values.masked_fill(~members, -torch.inf)[occurs].logsumexp(-1)
    every = values[occurs].logsumexp(-1)
    return (every - inside).mean()


def _image(g: Tensor | None) -> Tensor:
    if g is None:
        raise ValueError("contexts that depend on the image need its embedding g, but none was given")
    return g
