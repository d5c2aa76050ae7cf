"""Text embeddings of every prompt of a class, with gradients for a text tower that is fine-tuned."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from clipdense.clip import templates as template_sets
from clipdense.clip.model import ClipModel
from clipdense.clip.vocabulary import Vocabulary

__all__ = ["PromptEncoder"]

_CACHED_VOCABULARIES = 4


class PromptEncoder:
    """Text embeddings of P prompts per class, which are not averaged over the templates.

    `clipdense.clip.text.TextBank` averages, and caches rows of constant weights. Here the text tower may
    learn, so every call encodes the prompts again; only their tokens are kept.

    Args:
        clip: model with a text tower.
        templates: P templates: the name of a set, one template, or a list.
        synonyms: "first" uses the display name of a class (CAT-Seg); "mean" averages its names per template
            (SED).
        batch_size: prompts per forward without gradients.

    Raises:
        ValueError: If the model has no text tower, or ``synonyms`` is unknown.
    """

    def __init__(
        self,
        clip: ClipModel,
        templates: str | Sequence[str] | template_sets.TemplateSet,
        synonyms: str = "first",
        batch_size: int = 256,
    ) -> None:
        if synonyms not in ("first", "mean"):
            raise ValueError(f"synonyms must be 'first' or 'mean', not {synonyms!r}")
        if clip.text is None:
            raise ValueError(f"'{clip.name}' has no text tower, which is needed to encode class names")
        self.clip, self.text = clip, clip.text
        self.templates = template_sets.get(templates)
        self.synonyms, self.batch_size = synonyms, batch_size
        self._tokens: OrderedDict[tuple[tuple[str, ...], ...], Tensor] = OrderedDict()

    def __len__(self) -> int:
        return len(self.templates)

    def __call__(self, vocabulary: Vocabulary) -> Tensor:
        """Embed the prompts of K classes: (K, P, D), L2-normalised.

        Raises:
            ValueError: If prompts are too long for the text tower; the message lists them.
        """
        device = self.text.positional_embedding.device
        if device.type == "meta":
            return torch.empty(len(vocabulary), len(self), self.clip.embed_dim, device=device)
        rows = self.embed(self.tokens(vocabulary))
        counts = [len(names) for names in self._names(vocabulary)]
        if max(counts) == 1:
            return rows
        classes = torch.tensor([i for i, count in enumerate(counts) for _ in range(count)], device=device)
        sums = rows.new_zeros(len(vocabulary), *rows.shape[1:]).index_add(0, classes, rows)
        return F.normalize(sums, dim=-1)

    def tokens(self, vocabulary: Vocabulary) -> Tensor:
        """Tokenize the prompts of all N names that are used: (N, P, L)."""
        key = tuple(self._names(vocabulary))
        if key not in self._tokens:
            names = [name for names in key for name in names]
            ids = self.clip.tokenize([prompt for name in names for prompt in self.templates.fill(name)])
            self._tokens[key] = ids.unflatten(0, (len(names), len(self)))
            while len(self._tokens) > _CACHED_VOCABULARIES:
                self._tokens.popitem(last=False)
        return self._tokens[key]

    def embed(self, tokens: Tensor) -> Tensor:
        """Embed token ids (N, P, L) as (N, P, D), L2-normalised; with gradients all at once."""
        flat = tokens.flatten(0, 1)
        learns = torch.is_grad_enabled() and any(p.requires_grad for p in self.text.parameters())
        parts = [flat] if learns else flat.split(self.batch_size)
        rows = torch.cat([self.clip.encode_text(part) for part in parts])
        return F.normalize(rows, dim=-1).unflatten(0, tokens.shape[:2])

    def _names(self, vocabulary: Vocabulary) -> list[tuple[str, ...]]:
        return [names if self.synonyms == "mean" else names[:1] for names in vocabulary.synonyms]
