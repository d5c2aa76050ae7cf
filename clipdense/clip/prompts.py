"""Learned contexts of class names for text towers: CoOp, DenseCLIP, zsseg.

Every learner is a `LearnedPrompts`, so that each system with text takes any of them. Contexts that depend on
the image are in `clipdense.clip.image_prompts`, learned tokens of image towers in
`clipdense.clip.visual_prompts`, files of learners in `clipdense.clip.prompt_files`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from clipdense.clip.model import ClipModel
from clipdense.clip.templates import NAME_RULES
from clipdense.clip.text import LearnedPrompts
from clipdense.clip.towers import TextTower

__all__ = [
    "AffixPrompts",
    "ClassPrompts",
    "ContextPrompts",
    "NamePosition",
    "encode_with_affixes",
    "encode_with_contexts",
    "insert_contexts",
    "require_text_tower",
    "split_contexts",
]

NamePosition = Literal["end", "middle", "front"]
"""Place of the class name relative to the contexts."""

_BLOCK = 4096  # sequences of one forward without gradients


def split_contexts(contexts: Tensor, position: str) -> tuple[Tensor, Tensor]:
    """Split contexts (..., N, C) into those before and those after the name; "middle": floor(N / 2) before.

    Raises:
        ValueError: If the position is unknown.
    """
    if position not in get_args(NamePosition):
        raise ValueError(
            f"the position of the class name is {position!r}; expected {', '.join(get_args(NamePosition))}"
        )
    count = contexts.shape[-2]
    before = {"end": count, "middle": count // 2, "front": 0}[position]
    return contexts[..., :before, :], contexts[..., before:, :]


def insert_contexts(
    tower: TextTower, tokens: Tensor, contexts: Tensor, position: str = "end", tail: int = 0
) -> Tensor:
    """Build token embeddings [start | contexts | name | contexts | rest of the text].

    Args:
        tower: text tower whose token table is used.
        tokens: ids (K, L) of the texts without contexts.
        contexts: (B, N, C), B sets of N vectors; or (B, K, N, C), sets of their own for each text.
        position: place of the name: "end" (all contexts before it), "middle" or "front".
        tail: number of tokens between the name and the end token; CoOp's full stop is 1.

    Returns:
        (B, K, L + N, C): every text with every set, positions not added.
    """
    return _insert(tower, tokens, *split_contexts(contexts, position), tail)


def encode_with_contexts(
    tower: TextTower, tokens: Tensor, contexts: Tensor, position: str = "end", tail: int = 0
) -> Tensor:
    """Embed K texts with B sets of contexts.

    If the contexts are the token embeddings of a sentence's words, the result is the embedding of the
    sentence. Same arguments as `insert_contexts`.

    Returns:
        (B, K, D), not L2-normalised.

    Raises:
        ValueError: If a text with its contexts is longer than the tower's positions, or the tower is
            bidirectional, because padding changes its result.
    """
    return encode_with_affixes(tower, tokens, *split_contexts(contexts, position), tail)


def encode_with_affixes(
    tower: TextTower, tokens: Tensor, before: Tensor, after: Tensor, tail: int = 0
) -> Tensor:
    """Embed K texts with B sets of vectors before and after the name, (B, P, C) and (B, S, C).

    Further arguments, return value and errors as of `encode_with_contexts`.
    """
    if not tower.causal:
        raise ValueError("learned contexts need a causal text tower; this one is bidirectional")
    end = tower.end(tokens)
    tokens = tokens[:, : int(end.max()) + 1]
    sequences = _insert(tower, tokens, before, after, tail)
    batch, count = sequences.shape[:2]
    ends = (end + before.shape[-2] + after.shape[-2]).repeat(batch)
    rows = sequences.flatten(0, 1)
    size = max(1, len(rows)) if torch.is_grad_enabled() else _BLOCK
    blocks = zip(torch.split(rows, size), torch.split(ends, size), strict=True)
    return torch.cat([tower.encode(*block) for block in blocks]).reshape(batch, count, -1)


def _insert(tower: TextTower, tokens: Tensor, before: Tensor, after: Tensor, tail: int) -> Tensor:
    """Build token embeddings [start | before | name | after | rest] (B, K, L + P + S, C)."""
    words: Tensor = tower.token_embedding(tokens)
    before, after = (
        (x[:, None].expand(-1, len(words), -1, -1) if x.dim() == 3 else x).to(words.dtype)
        for x in (before, after)
    )
    rows = torch.cat([words.expand(len(before), -1, -1, -1), before, after], dim=2)
    # places, in the sequence, of every token, vector before and vector after the name
    token = torch.arange(tokens.shape[1], device=tokens.device)
    last = tower.end(tokens)[:, None] - tail
    moved = token + before.shape[2] * (token > 0) + after.shape[2] * (token >= last)
    first = torch.arange(1, before.shape[2] + 1, device=tokens.device).expand(len(words), -1)
    second = torch.arange(after.shape[2], device=tokens.device) + last + before.shape[2]
    order = torch.cat([moved, first, second], dim=1).argsort(dim=1)
    return rows.gather(2, order[None, :, :, None].expand_as(rows))


def require_text_tower(clip: ClipModel) -> TextTower:
    """Return the text tower of a CLIP.

    Raises:
        ValueError: If it was loaded without one.
    """
    if clip.text is None:
        raise ValueError(f"'{clip.name}' was loaded without its text tower: load it with text=True")
    return clip.text


class ClassPrompts(LearnedPrompts):
    """Base of learners of contexts around class names.

    A subclass implements `contexts_of`. Learners whose contexts depend on the image set `image_dependent`.

    Attributes:
        position: place of the name: "end", "middle" or "front".
        tail: number of tokens between the name and the end token.
        width: C, channels of the contexts, those of the text tower's tokens.
        embed_dim: D, channels of the image embeddings that the contexts depend on; 0: none.
    """

    width: int
    embed_dim: int = 0

    def __init__(self, n_ctx: int, *, position: str = "end", full_stop: bool = False) -> None:
        """
        Args:
            n_ctx: N, number of context vectors.
            position: place of the name: "end", "middle" (floor(N / 2) vectors before it) or "front".
            full_stop: whether the text is the name with a full stop (CoOp) or the name alone (DenseCLIP).

        Raises:
            ValueError: If the position is unknown.
        """
        super().__init__()
        self.length = n_ctx
        self.position, self.tail = position, int(full_stop)
        self.template = "{}." if full_stop else "{}"
        split_contexts(torch.zeros(n_ctx, 1), position)  # checks the position

    def contexts_of(self, names: Sequence[str], g: Tensor | None, z: Tensor | None) -> Tensor:
        """Return the contexts (B, N, C), or (B, K, N, C) if each of the K names has its own.

        Args:
            names: K class names.
            g: image embeddings (B, D), not L2-normalised; read only by image-dependent learners (B is 1 for
                others).
            z: dense maps (B, D, h, w) in the joint space; read only by pre-model prompting.
        """
        raise NotImplementedError

    def encode(
        self,
        tower: TextTower,
        tokens: Tensor,
        names: Sequence[str] = (),
        g: Tensor | None = None,
        z: Tensor | None = None,
    ) -> Tensor:
        """Embed token ids (K, L) of filled templates as (B, K, D), not L2-normalised; see `contexts_of`.

        Raises:
            ValueError: See `encode_with_contexts`; also if class-specific contexts do not know a name.
        """
        return encode_with_contexts(tower, tokens, self.contexts_of(names, g, z), self.position, self.tail)

    def forward(self, clip: ClipModel, tokens: Tensor, names: Sequence[str] = ()) -> Tensor:
        """Embed token ids (n, L) with the contexts as (n, D), not L2-normalised.

        Args:
            clip: model with the text tower.
            tokens: ids of the filled templates.
            names: class name of each row; read only by class-specific contexts.

        Raises:
            ValueError: If the contexts depend on the image, the CLIP has no text tower, or class-specific
                contexts do not know a name; see also `encode_with_contexts`.
        """
        self.require_fixed()
        return self.encode(require_text_tower(clip), tokens, names)[0]


class ContextPrompts(ClassPrompts):
    """Contexts around class names, shared by all classes (generic) or of each class (class-specific).

    Attributes:
        contexts: (1, N, C), or (K, N, C) of the classes in `classes`.

    Source: CoOp (Zhou et al., Learning to Prompt for Vision-Language Models, IJCV 2022), section 3.2;
        DenseCLIP (Rao et al., CVPR 2022), section 3.2 (language-domain prompting).
    """

    def __init__(
        self,
        n_ctx: int,
        width: int,
        std: float = 1.0,
        *,
        position: str = "end",
        full_stop: bool = False,
        classes: Sequence[str] = (),
    ) -> None:
        """
        Args:
            n_ctx: N, number of context vectors.
            width: C of the text tower's tokens.
            std: standard deviation of the initial normal distribution, truncated at 2: DenseCLIP uses 1, CoOp
                uses 0.02.
            position, full_stop: see `ClassPrompts`.
            classes: class names with contexts of their own; empty: all names share the contexts.

        Raises:
            ValueError: If the position is unknown.
        """
        super().__init__(n_ctx, position=position, full_stop=full_stop)
        self.width, self.classes = width, tuple(classes)
        self.contexts = nn.Parameter(torch.zeros(len(self.classes) or 1, n_ctx, width))
        if std:  # the truncated normal distribution is undefined for 0
            nn.init.trunc_normal_(self.contexts, std=std)

    def contexts_of(self, names: Sequence[str], g: Tensor | None = None, z: Tensor | None = None) -> Tensor:
        """Return the generic contexts (1, N, C), or those of each name, (1, K, N, C)."""
        if not self.classes:
            return self.contexts
        clean = NAME_RULES["spaces"]
        rows = {clean(name): i for i, name in enumerate(self.classes)}
        if unknown := [name for name in dict.fromkeys(names) if clean(name) not in rows]:
            raise ValueError(
                f"class-specific contexts know the {len(self.classes)} classes that they were trained on, "
                f"not {', '.join(map(repr, unknown[:5]))}: use these classes, or train generic contexts "
                "(MODEL.PROMPT.CLASS_SPECIFIC False)"
            )
        return self.contexts[[rows[clean(name)] for name in names]][None]

    @torch.no_grad()
    def start_from_words(self, clip: ClipModel, words: str) -> None:
        """Set the last contexts to the token embeddings of words, such as "a photo of a".

        Raises:
            ValueError: If the words have more tokens than there are contexts.
        """
        tower = require_text_tower(clip)
        with torch.device("cpu"):  # a model on the meta device needs the lengths too
            tokens = clip.tokenize([NAME_RULES["spaces"](words)], tower.context_length)
        ids = tokens[0, 1 : int(tower.end(tokens)[0])]
        if len(ids) > self.length:
            raise ValueError(
                f"the context words {words!r} have {len(ids)} tokens, but there are {self.length} contexts: "
                "raise their number (MODEL.LANGUAGE.N_CONTEXTS or MODEL.PROMPT.N_CONTEXTS)"
            )
        self.contexts[:, self.length - len(ids) :] = tower.token_embedding(ids.to(self.contexts.device))


class AffixPrompts(ClassPrompts):
    """Learned vectors around a class name: [start | prefix | name | suffix | last token | end].

    The last token is the full stop of the template "{}.".

    Attributes:
        prefix: (P, C), vectors before the name.
        suffix: (S, C), vectors after the name.

    Source: zsseg (Xu et al., A Simple Baseline for Open-Vocabulary Semantic Segmentation, ECCV 2022), section
        3.3.
    """

    def __init__(self, n_prefix: int, n_suffix: int, width: int, std: float = 0.02) -> None:
        """
        Args:
            n_prefix: P, may be 0. Published: 16.
            n_suffix: S, may be 0. Published: 0.
            width: C of the text tower's tokens.
            std: standard deviation of the initial normal distribution.
        """
        super().__init__(n_prefix + n_suffix, full_stop=True)
        self.template = ""  # the system's own templates, which end with a full stop
        self.prefix = nn.Parameter(torch.randn(n_prefix, width) * std)
        self.suffix = nn.Parameter(torch.randn(n_suffix, width) * std)

    def encode(
        self,
        tower: TextTower,
        tokens: Tensor,
        names: Sequence[str] = (),
        g: Tensor | None = None,
        z: Tensor | None = None,
    ) -> Tensor:
        """Embed token ids (n, L) with the learned vectors as (1, n, D), not L2-normalised."""
        before, after = self.prefix[None], self.suffix[None]
        return encode_with_affixes(tower, tokens, before, after, self.tail)
