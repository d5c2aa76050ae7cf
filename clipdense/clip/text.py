"""TextBank: text embeddings of a vocabulary and templates, encoded once and cached on disk."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
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
    from clipdense.clip.towers import TextTower

__all__ = ["LearnedPrompts", "TextBank", "TextEmbedder"]

_FORMAT = 1  # version of the cached rows; increase it when their meaning changes
_BLOCK = 8192  # prompts that are sorted, encoded and stored together
_PROBE = "A photo of a Café-bar's T-shirt: 3 air_conditioners (weapon), don't!"


class TextEmbedder(ABC):
    """Source of text embeddings for a vocabulary: a `TextBank`, or a precomputed `TextTable`.

    Args:
        synonyms: "mean" averages the names of a class (ZegFormer: over all templates x synonyms), "first"
            uses the display name only (CAT-Seg).

    Raises:
        ValueError: If ``synonyms`` is neither.
    """

    def __init__(self, synonyms: str) -> None:
        if synonyms not in ("mean", "first"):
            raise ValueError(f"synonyms must be 'mean' or 'first', not '{synonyms}'")
        self.synonyms = synonyms

    @abstractmethod
    def rows(self, vocabulary: Vocabulary) -> tuple[Tensor, Tensor]:
        """Return one row per name and the class of each row.

        Returns:
            (S, D) means over the templates, float32 on the CPU, not L2-normalised; (S,) int64 classes.
        """

    @property
    @abstractmethod
    def dim(self) -> int:
        """Dimension of the embeddings."""

    @property
    def device(self) -> torch.device:
        """Device of the results."""
        return torch.device("cpu")

    def __call__(self, vocabulary: Vocabulary | str | Sequence[str]) -> Tensor:
        """Return class embeddings (K, D), float32, L2-normalised.

        Args:
            vocabulary: anything that `Vocabulary.parse` accepts.
        """
        vocabulary = Vocabulary.parse(vocabulary)
        rows, index = self.rows(vocabulary)
        sums = rows.new_zeros(len(vocabulary), rows.shape[1], dtype=torch.float64)
        return F.normalize(sums.index_add_(0, index, rows.double()), dim=-1).float().to(self.device)

    def per_synonym(self, vocabulary: Vocabulary | str | Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return one embedding per name, for scores that take the maximum over synonyms (FC-CLIP, ODISE).

        Returns:
            (S, D) float32, L2-normalised, in the order of the classes; (S,) int64 class of each row.
        """
        rows, index = self.rows(Vocabulary.parse(vocabulary))
        return F.normalize(rows.double(), dim=-1).float().to(self.device), index.to(self.device)

    def names(self, vocabulary: Vocabulary) -> list[tuple[int, str]]:
        """Return the (class, name) pairs to embed, in order."""
        kept = (names if self.synonyms == "mean" else names[:1] for names in vocabulary.synonyms)
        return [(i, name) for i, names in enumerate(kept) for name in names]


class LearnedPrompts(nn.Module):
    """Learned context that replaces `ClipModel.encode_text`.

    Attributes:
        length: number of tokens by which the context shortens the longest text.
        template: the template whose filled texts the context was learned with; "": the caller's templates.
        image_dependent: whether the embeddings depend on the image, so that a vocabulary has none of its own.
        classes: class names that a class-specific context knows; empty: any.
        reads_map: whether an image-dependent context reads the dense map besides the image embedding.
    """

    length: int = 0
    template: str = ""
    image_dependent: bool = False
    classes: tuple[str, ...] = ()
    reads_map: bool = False

    def forward(self, clip: ClipModel, tokens: Tensor, names: Sequence[str] = ()) -> Tensor:
        """Embed token ids (n, L) of filled templates as (n, D), not L2-normalised.

        Args:
            clip: model with the text tower.
            tokens: the ids.
            names: class name of each row; given only to a context with `classes`.
        """
        return clip.encode_text(tokens)

    def require_fixed(self) -> None:
        """Check that the embeddings do not depend on the image.

        Raises:
            ValueError: If they do.
        """
        if self.image_dependent:
            raise ValueError(
                f"with {type(self).__name__}, class embeddings depend on the image, so that they can be "
                "neither cached nor stored in a text table: use a system that encodes texts for each image "
                "(MODEL.META_ARCHITECTURE PromptedCLIP, MODEL.TRUNK.NAME LanguageTrunk), or contexts that do "
                "not depend on the image (MODEL.PROMPT.METHOD contexts)"
            )


class TextBank(TextEmbedder):
    """Class embeddings from the text tower of a CLIP.

    Every prompt embedding is L2-normalised, the prompts of a name are averaged over the templates, the names
    of a class over its synonyms, and the result is L2-normalised. Every distinct name is encoded once. Its
    row is cached in memory and on disk under a hash of the tower's structure and weights, the tokenizer, the
    templates and the learned prompts, so a changed model never gets outdated rows. No gradients flow; a model
    that trains its text tower encodes texts itself.

    Args:
        clip: model with a text tower.
        templates: name of a set, one template, or a list of templates (see `templates.get`).
        synonyms: "mean" or "first", see `TextEmbedder`.
        cache_dir: folder of cached rows; "auto" is ``text`` in `clipdense.files.cache_dir`, None does not
            cache on disk.
        prompts: learned context; the template that it was learned with, if it has one, replaces
            ``templates``. Rows are cached in memory only while it, or the text tower, is in training mode
            with trainable weights.
        batch_size: number of prompts per forward.
        memory: number of rows cached in memory; the least recently used are dropped first.
        progress: show a progress bar for steps longer than a second.

    Raises:
        ValueError: If the model has no text tower, the learned context depends on the image, names are too
            long for the tower (the message lists all of them; open_clip would truncate them without a
            warning), or embeddings are not finite.
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
                f"'{clip.name}' has no text tower: use a precomputed text table (tools/make_text_table.py)"
            )
        if prompts is not None:
            prompts.require_fixed()
        self.clip = clip
        self.templates = template_sets.get((prompts.template if prompts is not None else "") or templates)
        self.prompts = prompts
        self.batch_size = batch_size
        self.progress = progress
        self._folder = default_cache_dir() / "text" if cache_dir == "auto" else cache_dir and Path(cache_dir)
        self._stores: dict[str, RowStore] = {}
        self._memory: OrderedDict[tuple[str, str], Tensor] = OrderedDict()
        self._memory_size = memory

    @cached_property
    def _tokenizer(self) -> _PromptTokenizer:
        assert self.clip.text is not None
        reserved = 0 if self.prompts is None else self.prompts.length
        return _PromptTokenizer(self.clip.tokenizer, self.clip.text.context_length, reserved)

    @property
    def dim(self) -> int:
        """Dimension of the embeddings."""
        return self.clip.embed_dim

    @property
    def device(self) -> torch.device:
        """Device of the text tower, and of the results."""
        return next(self._text.parameters()).device

    @property
    def _text(self) -> TextTower:
        assert self.clip.text is not None
        return self.clip.text

    @property
    def _averages_first(self) -> bool:
        """Whether prompts are averaged before the last step of the tower; learned prompts never are."""
        return self._text.averages_first and self.prompts is None

    def fingerprint(self) -> str:
        """Hash everything that determines the row of a name, except the name."""
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
        """Embed any names, which may repeat, as (n, D), float32, L2-normalised."""
        return F.normalize(self._rows(names).double(), dim=-1).float().to(self.device)

    def _rows(self, names: Sequence[str]) -> Tensor:
        cleaned = [self.templates.clean(name) for name in names]
        # no inference tensors, even under inference_mode: a later training step may use the same rows
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
        """Yield the rows of new names block by block, so that an interruption keeps the finished blocks."""
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
                owners = [name for name in block for _ in range(count)]
                embedded = self._forward(prompts, owners, bar)[prompts.inverse]
                means = embedded.reshape(len(block), count, -1).double().mean(1).float()
                if self._averages_first:
                    means = self._text.finish(means.to(self.device)).cpu()
                yield {name: row.clone() for name, row in zip(block, means, strict=True)}

    def _forward(self, prompts: _Prompts, owners: list[str], bar: Any) -> Tensor:
        """Return embeddings (n, D) of distinct prompts, float32 on the CPU: L2-normalised, unless the tower
        averages first.

        Prompts are sorted by length, because the tower runs a batch at the length of its longest prompt.

        Args:
            prompts: the tokens.
            owners: class name of each given prompt, repetitions included.
            bar: progress bar, updated by prompts.
        """
        names = dict(zip(prompts.inverse.tolist(), owners, strict=True))
        if self.prompts is not None:
            self.prompts.to(self.device)  # those of a file are not part of any model
        device, out = self.device, []
        order = prompts.lengths.argsort()
        for chunk in torch.split(order, self.batch_size):
            tokens = prompts.tokens[chunk].to(device, torch.long)
            with torch.autocast(device.type, enabled=False):
                if self._averages_first:
                    features = self._text.unfinished(tokens)
                elif self.prompts is None:
                    features = self.clip.encode_text(tokens)
                elif self.prompts.classes:
                    features = self.prompts(self.clip, tokens, [names[i] for i in chunk.tolist()])
                else:
                    features = self.prompts(self.clip, tokens)
            out.append(features.float() if self._averages_first else F.normalize(features.float(), dim=-1))
            bar.update(len(chunk))
        rows = torch.cat(out).cpu()
        if not rows.isfinite().all():
            raise ValueError(f"the text tower of '{self.clip.name}' returned embeddings that are not finite")
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
    """Tokens of distinct prompts.

    Attributes:
        tokens: (n, L) int32.
        lengths: (n,) number of tokens before the padding.
        inverse: (m,) row in `tokens` of every given prompt.
        too_long: positions of the given prompts that exceed the limit.
    """

    tokens: Tensor
    lengths: Tensor
    inverse: Tensor
    too_long: list[int]


class _PromptTokenizer:
    """Tokenizer of a CLIP that reports the prompts it would truncate."""

    def __init__(self, tokenizer: Any, context: int, reserved: int) -> None:
        self.tokenizer = tokenizer
        self.context = context
        self.limit = context - reserved

    @property
    def fingerprint(self) -> list[Any]:
        """Values that identify a tokenizer: class, cleaning, limit, and the ids of a probe sentence."""
        clean = getattr(getattr(self.tokenizer, "clean_fn", None), "__qualname__", None)
        tokens: Tensor = self.tokenizer([_PROBE], context_length=self.context)
        return [type(self.tokenizer).__qualname__, clean, self.limit, tokens.tolist()]

    def __call__(self, prompts: Sequence[str]) -> _Prompts:
        distinct = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
        inverse = [distinct[prompt] for prompt in prompts]
        if isinstance(self.tokenizer, SimpleTokenizer):  # encode once, for counts and tokens
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
