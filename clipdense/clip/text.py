"""TextBank: vocabulary x templates -> text embeddings, encoded once and kept on disk."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from open_clip.tokenizer import SimpleTokenizer
from torch import Tensor, nn
from tqdm import tqdm

from clipdense.clip import templates as template_sets
from clipdense.clip.cache import RowStore, module_fingerprint
from clipdense.clip.tokenizer import token_counts
from clipdense.clip.vocabulary import Vocabulary
from clipdense.files import cache_dir as default_cache_dir

if TYPE_CHECKING:
    from clipdense.clip.model import ClipModel

__all__ = ["LearnedPrompts", "TextBank", "TextEmbedder"]

_FORMAT = 1  # of cached rows; raise it when their meaning changes
_BLOCK = 8192  # prompts that are sorted, encoded and kept together
_PROBE = "A photo of a Café-bar's T-shirt: 3 air_conditioners (weapon), don't!"


class TextEmbedder(ABC):
    """What turns a vocabulary into text embeddings: a `TextBank`, or a precomputed `TextTable`.

    Args:
        synonyms: "mean" averages the names of a class (ZegFormer: over all templates x synonyms), "first"
            takes the display name alone (CAT-Seg).
    """

    def __init__(self, synonyms: str) -> None:
        if synonyms not in ("mean", "first"):
            raise ValueError(f"synonyms must be 'mean' or 'first', not '{synonyms}'")
        self.synonyms = synonyms

    @abstractmethod
    def rows(self, vocabulary: Vocabulary) -> tuple[Tensor, Tensor]:
        """Rows (S, D), one a name, float32 on the CPU, template means, not unit length; their class (S,)."""

    @property
    @abstractmethod
    def dim(self) -> int:
        """D."""

    @property
    def device(self) -> torch.device:
        """Where results go."""
        return torch.device("cpu")

    def __call__(self, vocabulary: Vocabulary | str | Sequence[str]) -> Tensor:
        """Class embeddings (K, D), float32 unit rows; `vocabulary` is anything `Vocabulary.parse` takes."""
        vocabulary = Vocabulary.parse(vocabulary)
        rows, index = self.rows(vocabulary)
        sums = rows.new_zeros(len(vocabulary), rows.shape[1], dtype=torch.float64)
        return F.normalize(sums.index_add_(0, index, rows.double()), dim=-1).float().to(self.device)

    def per_synonym(self, vocabulary: Vocabulary | str | Sequence[str]) -> tuple[Tensor, Tensor]:
        """Name embeddings (S, D), float32 unit rows in order of class, and the class (S,) int64 of each row.

        For scores that take the maximum over synonyms (FC-CLIP, ODISE).
        """
        rows, index = self.rows(Vocabulary.parse(vocabulary))
        return F.normalize(rows.double(), dim=-1).float().to(self.device), index.to(self.device)

    def names(self, vocabulary: Vocabulary) -> list[tuple[int, str]]:
        """The (class, name) pairs to embed, in order."""
        kept = (names if self.synonyms == "mean" else names[:1] for names in vocabulary.synonyms)
        return [(i, name) for i, names in enumerate(kept) for name in names]


class LearnedPrompts(nn.Module):
    """A learned context that stands in for `clip.encode_text`.

    Attributes:
        length: tokens that the context takes from the tower's context length.
    """

    length: int = 0

    def forward(self, clip: ClipModel, tokens: Tensor) -> Tensor:
        """Tokens (n, L) of the filled templates -> embeddings (n, D), not normalised."""
        return clip.encode_text(tokens)


class TextBank(TextEmbedder):
    """Class embeddings from a CLIP's text tower.

    Every prompt embedding is L2-normalised, the prompts of a name are averaged over the templates, the names
    of a class over its synonyms, and the result is normalised. Every distinct name is encoded once: in memory
    and on disk it is kept under the hash of the tower's structure and weights, the tokenizer, the templates
    and the learned prompts, so that a changed model never meets stale text. Gradients do not flow; a model
    that trains its text tower encodes by itself.

    Args:
        clip: a model with a text tower.
        templates: a set's name, one template, or a list of templates (`templates.get`).
        synonyms: "mean" or "first", see `TextEmbedder`.
        cache_dir: folder of kept rows; "auto" is `text` in `default_cache_dir()`, None keeps nothing on disk.
        prompts: a learned context. While it, or the text tower, is in training mode with trainable weights,
            rows are kept in memory only.
        batch_size: prompts a forward.
        memory: rows kept in memory, the least recently used go first.
        progress: show a bar for what takes longer than a second.

    Raises:
        ValueError: the model has no text tower; a name is too long for it (all such names are listed:
            open_clip would cut them silently); embeddings that are not finite.
    """

    def __init__(
        self,
        clip: ClipModel,
        templates: str | Sequence[str] | template_sets.TemplateSet = "single",
        *,
        synonyms: str = "mean",
        cache_dir: str | Path | None = "auto",
        prompts: LearnedPrompts | None = None,
        batch_size: int = 256,
        memory: int = 16384,
        progress: bool = True,
    ) -> None:
        super().__init__(synonyms)
        if clip.text is None:
            raise ValueError(
                f"'{clip.name}' has no text tower; give a precomputed text table (clip/tables.py)"
            )
        self.clip = clip
        self.templates = template_sets.get(templates)
        self.prompts = prompts
        self.batch_size = batch_size
        self.progress = progress
        self._tokenizer = _PromptTokenizer(
            clip.tokenizer, clip.text.context_length, 0 if prompts is None else prompts.length
        )
        self._folder = default_cache_dir() / "text" if cache_dir == "auto" else cache_dir and Path(cache_dir)
        self._stores: dict[str, RowStore] = {}
        self._memory: OrderedDict[tuple[str, str], Tensor] = OrderedDict()
        self._memory_size = memory

    @property
    def dim(self) -> int:
        """D."""
        return self.clip.embed_dim

    @property
    def device(self) -> torch.device:
        """The text tower's."""
        return next(self._text.parameters()).device

    @property
    def _text(self) -> nn.Module:
        assert self.clip.text is not None
        return self.clip.text

    def fingerprint(self) -> str:
        """A hash of all that decides a name's row but the name."""
        parts = [
            _FORMAT,
            module_fingerprint(self._text),
            self._tokenizer.fingerprint,
            self.templates.fingerprint(),
            None if self.prompts is None else module_fingerprint(self.prompts),
        ]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]

    def rows(self, vocabulary: Vocabulary) -> tuple[Tensor, Tensor]:
        """See `TextEmbedder.rows`."""
        pairs = self.names(vocabulary)
        return self._rows([name for _, name in pairs]), torch.tensor([i for i, _ in pairs])

    def embed_names(self, names: Sequence[str]) -> Tensor:
        """Name embeddings (n, D), float32 unit rows, of any names: no vocabulary, so they may repeat."""
        return F.normalize(self._rows(names).double(), dim=-1).float().to(self.device)

    def _rows(self, names: Sequence[str]) -> Tensor:
        cleaned = [self.templates.clean(name) for name in names]
        # plain tensors, also when called under inference_mode: a later training step may use the same rows
        with torch.inference_mode(False), torch.no_grad():
            rows = self._lookup(list(dict.fromkeys(cleaned)))
            return torch.stack([rows[name] for name in cleaned]) if rows else torch.zeros(0, self.dim)

    def _lookup(self, names: list[str]) -> dict[str, Tensor]:
        key = self.fingerprint()
        rows = {name: self._memory[key, name] for name in names if (key, name) in self._memory}
        store = self._store(key)
        if store and len(rows) < len(names):
            rows |= store.read(name for name in names if name not in rows)
        for block in self._encode([name for name in names if name not in rows]):
            if store:
                store.write(block)
            rows |= block
        for name in names:
            self._memory[key, name] = rows[name]
            self._memory.move_to_end((key, name))
        while len(self._memory) > self._memory_size:
            self._memory.popitem(last=False)
        return rows

    def _store(self, key: str) -> RowStore | None:
        modules = [m for m in (self._text, self.prompts) if m is not None and m.training]
        if not self._folder or any(p.requires_grad for m in modules for p in m.parameters()):
            return None
        return self._stores.setdefault(key, RowStore(self._folder / key))

    def _encode(self, names: list[str]) -> Iterator[dict[str, Tensor]]:
        """Rows of new names, block by block: what is done stays kept when a later block is interrupted."""
        count = len(self.templates)
        size = max(1, _BLOCK // count)
        blocks = [names[i : i + size] for i in range(0, len(names), size)]
        tokenized: list[_Prompts] = []
        too_long: dict[str, None] = {}
        for block in self._bar(blocks, "tokenizing class names"):
            prompts = self._tokenizer([p for name in block for p in self.templates.fill(name)])
            tokenized.append(prompts)
            too_long |= dict.fromkeys(block[i // count] for i in prompts.too_long)
        if too_long:
            raise ValueError(
                f"class names too long for the text tower's {self._tokenizer.limit} tokens: "
                + ", ".join(map(repr, too_long))
            )
        with (
            self._evaluation(),
            tqdm(
                total=sum(len(p.tokens) for p in tokenized),
                desc="encoding class names",
                unit="prompt",
                delay=1.0,
                disable=not self.progress,
            ) as bar,
        ):
            for block, prompts in zip(blocks, tokenized, strict=True):
                embedded = self._forward(prompts, bar)[prompts.inverse]
                means = embedded.reshape(len(block), count, -1).double().mean(1).float()
                yield {name: row.clone() for name, row in zip(block, means, strict=True)}

    def _forward(self, prompts: _Prompts, bar: Any) -> Tensor:
        """Unit embeddings (n, D) float32 of distinct prompts, on the CPU.

        In order of length: the tower runs a batch at the length of its longest prompt.
        """
        device, out = self.device, []
        order = prompts.lengths.argsort()
        for chunk in torch.split(order, self.batch_size):
            tokens = prompts.tokens[chunk].to(device, torch.long)
            with torch.autocast(device.type, enabled=False):
                features = (
                    self.clip.encode_text(tokens) if self.prompts is None else self.prompts(self.clip, tokens)
                )
            out.append(F.normalize(features.float(), dim=-1))
            bar.update(len(chunk))
        rows = torch.cat(out).cpu()
        if not rows.isfinite().all():
            raise ValueError(f"the text tower of '{self.clip.name}' gives embeddings that are not finite")
        return rows[order.argsort()]

    @contextmanager
    def _evaluation(self) -> Iterator[None]:
        roots = [m for m in (self._text, self.prompts) if m is not None]
        training = [m for root in roots for m in root.modules() if m.training]
        try:
            for module in training:
                module.training = False
            yield
        finally:
            for module in training:
                module.training = True

    def _bar(self, items: list[list[str]], title: str) -> Iterator[list[str]]:
        return iter(tqdm(items, desc=title, unit="block", delay=1.0, disable=not self.progress))


@dataclass
class _Prompts:
    """Distinct prompts, tokenized.

    Attributes:
        tokens: (n, L) int32.
        lengths: (n,) tokens before the padding.
        inverse: (m,) the row in `tokens` of every prompt that was asked for.
        too_long: which of the m prompts are over the limit.
    """

    tokens: Tensor
    lengths: Tensor
    inverse: Tensor
    too_long: list[int]


class _PromptTokenizer:
    """A CLIP's tokenizer that tells what it would cut."""

    def __init__(self, tokenizer: Any, context: int, reserved: int) -> None:
        self.tokenizer = tokenizer
        self.context = context
        self.limit = context - reserved

    @property
    def fingerprint(self) -> list[Any]:
        """What tells tokenizers apart: kind, cleaning, limit, and what they make of an awkward sentence."""
        clean = getattr(getattr(self.tokenizer, "clean_fn", None), "__qualname__", None)
        tokens: Tensor = self.tokenizer([_PROBE], context_length=self.context)
        return [type(self.tokenizer).__qualname__, clean, self.limit, tokens.tolist()]

    def __call__(self, prompts: Sequence[str]) -> _Prompts:
        distinct = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
        inverse = [distinct[prompt] for prompt in prompts]
        if isinstance(self.tokenizer, SimpleTokenizer):  # its slow half once, for counts and tokens
            start, end = self.tokenizer.sot_token_id, self.tokenizer.eot_token_id
            ids = [[start, *self.tokenizer.encode(prompt), end] for prompt in distinct]
            counts = [len(row) for row in ids]
            rows = [(row + [0] * self.context)[: self.context] for row in ids]
            tokens = torch.tensor(rows, dtype=torch.int32)
        else:
            counts = token_counts(self.tokenizer, list(distinct))
            tokens = self.tokenizer(list(distinct), context_length=self.context).int()
        too_long = [i for i, j in enumerate(inverse) if counts[j] > self.limit]
        return _Prompts(tokens, torch.tensor(counts), torch.tensor(inverse), too_long)
