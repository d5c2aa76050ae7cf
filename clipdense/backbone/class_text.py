"""Embeddings of a fixed list of class names, from a text tower or from a table."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from clipdense.checkpoint import CheckpointError
from clipdense.clip import ClipModel
from clipdense.clip.prompts import ClassPrompts, ContextPrompts
from clipdense.clip.templates import NAME_RULES

__all__ = ["ClassTable", "ClassText"]


class ClassText(nn.Module):
    """Class embeddings t from a text tower with learned contexts (Rao et al., DenseCLIP, section 3.2).

    Embeddings without trainable parts are computed once and cached until a weight changes, unless they depend
    on the image.

    Attributes:
        classes: the K class names, without a template.
        tower: the text tower.
        prompts: the learned contexts, or None.
        embed_dim: D.
        image_dependent: whether the embeddings depend on the image (CoCoOp, pre-model prompting, ICPC).
    """

    def __init__(
        self,
        clip: ClipModel,
        classes: Sequence[str],
        *,
        n_ctx: int = 8,
        context_std: float = 1.0,
        context_words: str = "",
        trainable: bool = False,
        prompts: ClassPrompts | None = None,
    ) -> None:
        """
        Args:
            clip: a CLIP with text tower and tokenizer.
            classes: K class names.
            n_ctx: number of learned vectors between the start token and a name; 0: the name alone.
            context_std: standard deviation of the initial contexts. Published: 1; CoOp: 0.02.
            context_words: words whose token embeddings the last contexts start from, e.g. "a photo of a".
            trainable: whether the text tower is trained. The contexts always are.
            prompts: learned contexts of any kind, instead of those that the three arguments above describe.

        Raises:
            ValueError: If the CLIP has no text tower, if there are no classes, if names are too long for the
                text tower (lists them), or if there are more context words than contexts.
        """
        super().__init__()
        if clip.text is None:
            raise ValueError(f"'{clip.name}' has no text tower to embed class names with")
        if not classes:
            raise ValueError("the list of class names is empty: set MODEL.LANGUAGE.CLASSES or DATASETS")
        self.classes = tuple(classes)
        self.tower = clip.text.requires_grad_(trainable)
        self.embed_dim = clip.embed_dim
        texts = list(self.classes)
        if prompts is not None:
            texts = [prompts.template.format(NAME_RULES["spaces"](name)) for name in self.classes]
        elif n_ctx or context_words:
            prompts = ContextPrompts(n_ctx, clip.text.width, context_std)
            if context_words:
                prompts.start_from_words(clip, context_words)
        self.prompts = prompts
        self.image_dependent = prompts is not None and prompts.image_dependent
        with torch.device("cpu"):  # a model on the meta device needs the lengths too
            tokens = clip.tokenize(texts, clip.text.context_length)
        longest = int(clip.text.end(tokens).max()) + 1
        limit = clip.text.context_length - (0 if prompts is None else prompts.length)
        if longest > limit:
            clip.tokenize(texts, limit)  # raises, with the names
        self.register_buffer("tokens", tokens[:, :longest], persistent=False)
        self._cached: tuple[Hashable, Tensor] | None = None

    def forward(self, g: Tensor | None = None, z: Tensor | None = None) -> Tensor:
        """Return the embeddings (K, D), or (B, K, D) if they depend on the image; not L2-normalised.

        Args:
            g: image embeddings (B, D), see `ClassPrompts`.
            z: dense maps (B, D, h, w) in the joint space.
        """
        if self.image_dependent:
            assert self.prompts is not None
            return self.prompts.encode(self.tower, self._tokens, self.classes, g, z)
        if torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters()):
            return self._encode()
        key = self._state_key()
        if self._cached is None or self._cached[0] != key:
            # Training may use the cached tensor next, so it must not be an inference tensor.
            with torch.inference_mode(False), torch.no_grad():
                self._cached = key, self._encode()
        return self._cached[1]

    def train(self, mode: bool = True) -> ClassText:
        if mode != self.training:  # `_state_key` misses changes through `.data`
            self._cached = None
        return super().train(mode)

    def table(self) -> ClassTable:
        """Return the embeddings as a table that needs no text tower.

        Raises:
            ValueError: If the embeddings depend on the image.
        """
        if self.prompts is not None:
            self.prompts.require_fixed()
        with torch.no_grad():
            embeddings = self()
        table = ClassTable(self.classes, self.embed_dim)
        table.table.copy_(embeddings)
        return table.to(embeddings.device)

    def _encode(self) -> Tensor:
        if self.prompts is None:
            embeddings: Tensor = self.tower(self._tokens)
            return embeddings
        return self.prompts.encode(self.tower, self._tokens, self.classes)[0]

    @property
    def _tokens(self) -> Tensor:
        tokens: Any = self.tokens
        return tokens

    def _state_key(self) -> Hashable:
        """Return a key that changes with every assignment to, and in-place change of, a weight."""
        return tuple((p.data_ptr(), p._version, p.dtype) for p in self.parameters())


class ClassTable(nn.Module):
    """Class embeddings as a table, which replaces a frozen `ClassText` and its text tower.

    A checkpoint provides the embeddings; it must list the same class names.

    Attributes:
        classes: the K class names.
        table: the embeddings (K, D).
    """

    table: Tensor
    classes_key: Tensor

    def __init__(self, classes: Sequence[str], embed_dim: int) -> None:
        """
        Args:
            classes: K class names.
            embed_dim: D.
        """
        super().__init__()
        self.classes = tuple(classes)
        self.embed_dim = embed_dim
        digest = hashlib.sha256(json.dumps(self.classes).encode()).digest()
        self.register_buffer("table", torch.zeros(len(self.classes), embed_dim))
        self.register_buffer("classes_key", torch.tensor(list(digest), dtype=torch.uint8))

    def forward(self) -> Tensor:
        """Return the embeddings (K, D), not L2-normalised."""
        return self.table

    def _load_from_state_dict(
        self, state_dict: dict[str, Tensor], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        key = state_dict.get(f"{prefix}classes_key")
        if key is not None and not torch.equal(key.cpu(), self.classes_key.cpu()):
            raise CheckpointError(
                f"the weights hold embeddings of other classes than the model's {len(self.classes)} "
                f"({', '.join(self.classes[:5])}, ...): set MODEL.LANGUAGE.TEXT tower, and load weights that "
                "include the text tower"
            )
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
