"""Embeddings of a fixed list of classes inside a model: from a text tower, or as a table without one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from clipdense.checkpoint import CheckpointError
from clipdense.clip import ClipModel
from clipdense.clip.prompts import ContextPrompts, encode_with_contexts

__all__ = ["ClassTable", "ClassText"]


class ClassText(nn.Module):
    """Class embeddings T from a text tower, with learned contexts (DenseCLIP, section 3.2).

    What does not depend on anything in training is computed once and kept until a weight changes.

    Attributes:
        classes: the K names; raw, without a template.
        tower: the text tower; `prompts` the contexts, or None.
        embed_dim: D.
    """

    def __init__(
        self, clip: ClipModel, classes: Sequence[str], *, n_ctx: int = 8, trainable: bool = False
    ) -> None:
        """
        Args:
            clip: whose text tower and tokenizer are taken.
            classes: K names.
            n_ctx: learned vectors between the start token and a name; 0 for the names alone.
            trainable: whether the tower itself is trained; the contexts always are.

        Raises:
            ValueError: no text tower, no class, or names too long for it, which are listed.
        """
        super().__init__()
        if clip.text is None:
            raise ValueError(f"'{clip.name}' has no text tower to embed class names with")
        if not classes:
            raise ValueError("no class to embed")
        self.classes = tuple(classes)
        self.tower = clip.text.requires_grad_(trainable)
        self.embed_dim = clip.embed_dim
        self.prompts = ContextPrompts(n_ctx, clip.text.width) if n_ctx else None
        with torch.device("cpu"):  # their lengths are read, also where a model is built on the meta device
            tokens = clip.tokenize(self.classes, clip.text.context_length)
        longest = int(clip.text.end(tokens).max()) + 1
        if longest + n_ctx > clip.text.context_length:
            limit = clip.text.context_length - n_ctx
            clip.tokenize(self.classes, limit)  # raises, with the names
        self.register_buffer("tokens", tokens[:, :longest], persistent=False)
        self._kept: tuple[Hashable, Tensor] | None = None

    def forward(self) -> Tensor:
        """(K, D), not L2-normalised."""
        if torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters()):
            return self._encode()
        key = self._state_key()
        if self._kept is None or self._kept[0] != key:
            # A plain tensor, also under inference_mode: training may use it next.
            with torch.inference_mode(False), torch.no_grad():
                self._kept = key, self._encode()
        return self._kept[1]

    def train(self, mode: bool = True) -> ClassText:
        if mode != self.training:  # also what escapes `_state_key`, a change through `.data`, ends here
            self._kept = None
        return super().train(mode)

    def table(self) -> ClassTable:
        """The embeddings without the tower that made them."""
        with torch.no_grad():
            embeddings = self()
        table = ClassTable(self.classes, self.embed_dim)
        table.table.copy_(embeddings)
        return table.to(embeddings.device)

    def _encode(self) -> Tensor:
        tokens: Any = self.tokens
        if self.prompts is None:
            embeddings: Tensor = self.tower(tokens)
            return embeddings
        return encode_with_contexts(self.tower, tokens, self.prompts.contexts)[0]

    def _state_key(self) -> Hashable:
        """Changes with every assignment to, and every in-place change of, a weight."""
        return tuple((p.data_ptr(), p._version, p.dtype) for p in self.parameters())


class ClassTable(nn.Module):
    """Class embeddings that stand in for a frozen `ClassText`: no text tower in memory.

    They come from a checkpoint, whose list of classes must be this one.

    Attributes:
        classes: the K names.
        table: (K, D).
    """

    table: Tensor
    classes_key: Tensor

    def __init__(self, classes: Sequence[str], embed_dim: int) -> None:
        super().__init__()
        self.classes = tuple(classes)
        self.embed_dim = embed_dim
        digest = hashlib.sha256(json.dumps(self.classes).encode()).digest()
        self.register_buffer("table", torch.zeros(len(self.classes), embed_dim))
        self.register_buffer("classes_key", torch.tensor(list(digest), dtype=torch.uint8))

    def forward(self) -> Tensor:
        """(K, D), not L2-normalised."""
        return self.table

    def _load_from_state_dict(
        self, state_dict: dict[str, Tensor], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        key = state_dict.get(f"{prefix}classes_key")
        if key is not None and not torch.equal(key.cpu(), self.classes_key.cpu()):
            raise CheckpointError(
                f"the weights hold embeddings of other classes than the model's {len(self.classes)} "
                f"({', '.join(self.classes[:5])}, ...): set MODEL.LANGUAGE.TEXT tower and load weights that "
                "have the text tower"
            )
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
