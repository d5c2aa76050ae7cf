"""Precomputed text tables: text embeddings without a text tower.

A table file has one matrix and optionally an index: for every row the class, and optionally the synonym and
the template.

- `.safetensors`: tensor `embeddings` (or the only one); metadata `index` as JSON `{"classes": [...],
"synonyms": [...],
  "templates": [...]}`, one entry per row each, the last two optional. `save_table` writes this.
- `.pt`: a matrix, or a dict with `embeddings` and optionally `index`. Read with `weights_only`.
- `.npy`: the matrix; `<file>.json` beside it may hold the index.

For a file without an index, the caller names the rows.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from clipdense.clip.text import TextBank, TextEmbedder
from clipdense.clip.vocabulary import Vocabulary, canonical, near
from clipdense.files import atomic_path

__all__ = ["TableIndex", "TextTable", "find_table", "save_table"]

_MEANS = "means of unit prompts"


@dataclass(frozen=True)
class TableIndex:
    """Meaning of the R rows of a table.

    Attributes:
        classes: R class names, or all names of each class if known; the first is the display name.
        synonyms: R names; None: a row represents the whole class.
        templates: R templates; rows that differ in the template only are averaged.
    """

    classes: tuple[tuple[str, ...], ...]
    synonyms: tuple[str, ...] | None = None
    templates: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        for field in (self.synonyms, self.templates):
            if field is not None and len(field) != len(self):
                raise ValueError(f"the index has {len(self)} classes, but {len(field)} synonyms or templates")

    def __len__(self) -> int:
        return len(self.classes)

    @classmethod
    def from_content(cls, content: Mapping[str, Sequence[str]]) -> TableIndex:
        """Create an index from the JSON layout that the module describes.

        Raises:
            ValueError: If the content has another layout.
        """
        if not isinstance(content, Mapping):
            raise ValueError(f"the index must be a dict with 'classes', found {type(content).__name__}")
        for key in ("classes", "synonyms", "templates"):
            names = content.get(key) if key != "classes" else content.get(key, 0)
            if names is not None and not (
                isinstance(names, Sequence) and all(isinstance(name, str) for name in names)
            ):
                raise ValueError(f"'{key}' of the index must be a list of names")
        fields = {k: tuple(v) for k in ("synonyms", "templates") if (v := content.get(k)) is not None}
        return cls(tuple((name,) for name in content["classes"]), **fields)

    @classmethod
    def from_vocabulary(cls, vocabulary: Vocabulary, rows: int) -> TableIndex | None:
        """Create an index with one row per class or per name, as the count tells; None if neither fits."""
        if rows == len(vocabulary):
            return cls(vocabulary.synonyms)
        if rows == sum(map(len, vocabulary.synonyms)):
            pairs = [(names, name) for names in vocabulary.synonyms for name in names]
            return cls(tuple(names for names, _ in pairs), tuple(name for _, name in pairs))
        return None


class TextTable(TextEmbedder):
    """Text embeddings from a table, for vocabularies whose names it contains; same interface as `TextBank`.

    If rows represent whole classes, a class is found by its display name. If rows represent names, every
    requested name must be in the table.

    Args:
        embeddings: (R, D), any float type.
        index: meaning of the rows.
        synonyms: "mean" or "first", see `TextEmbedder`.
        unit: L2-normalise every row first; False for rows that are means of unit rows (`save_table`).
        source: name of the table in errors.

    Raises:
        ValueError: If the number of rows differs from the index, or rows are zero or not finite.
    """

    def __init__(
        self,
        embeddings: Tensor,
        index: TableIndex,
        *,
        synonyms: str = "mean",
        unit: bool = True,
        source: str = "text table",
    ) -> None:
        super().__init__(synonyms)
        embeddings = embeddings.detach().float().cpu()
        if embeddings.dim() != 2 or len(embeddings) != len(index):
            raise ValueError(
                f"{source}: {tuple(embeddings.shape)} embeddings for {len(index)} rows of the index"
            )
        bad = ~embeddings.isfinite().all(1) | (embeddings == 0).all(1)
        if bad.any():
            raise ValueError(f"{source}: rows {bad.nonzero().flatten().tolist()[:20]} are zero or not finite")
        self.source = source
        self.index = index
        self.embeddings = F.normalize(embeddings, dim=1) if unit else embeddings
        self.by_class = index.synonyms is None
        rows: dict[tuple[str, ...], list[int]] = {}
        for row, names in enumerate(index.classes):
            rows.setdefault(_key(names, None if index.synonyms is None else index.synonyms[row]), []).append(
                row
            )
        self._vectors = {key: self.embeddings[ids].double().mean(0).float() for key, ids in rows.items()}
        # fallback for missing keys: all rows of a display name, or of a name in any class
        self._similar: dict[str, list[Tensor]] = {}
        for key, vector in self._vectors.items():
            self._similar.setdefault(key[0] if self.by_class else key[-1], []).append(vector)

    @classmethod
    def load(
        cls,
        path: str | Path,
        names: Vocabulary | str | Path | Sequence[str] | None = None,
        *,
        dim: int | None = None,
        synonyms: str = "mean",
    ) -> TextTable:
        """Read a table file.

        Args:
            path: .safetensors, .pt, .pth or .npy; see the module.
            names: meaning of the rows if the file has no index: anything that `Vocabulary.parse` accepts,
                with one row per class or per name.
            dim: D if known (`clip.embed_dim`); distinguishes rows from columns, and is checked.
            synonyms: "mean" or "first".

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the file is damaged, has no names, or the number of names fits neither or both
                sides of the matrix.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"no text table '{path}'")
        matrix, content = _read(path)
        shape = tuple(matrix.shape)
        source = f"text table '{path}'"
        if matrix.dim() != 2 or not matrix.is_floating_point():
            raise ValueError(f"{source} holds {matrix.dtype} {shape}, not a matrix of floats")
        if "index" in content:
            try:
                known = TableIndex.from_content(content["index"])
            except ValueError as error:
                raise ValueError(f"{source}: {error}") from error
            layouts = [(m, known) for m in (matrix, matrix.T) if len(m) == len(known)][:1]
            expected = f"the {len(known)} rows of its index"
        elif names is not None:
            vocabulary = Vocabulary.parse(names)
            indices = [(m, TableIndex.from_vocabulary(vocabulary, len(m))) for m in (matrix, matrix.T)]
            layouts = [(m, index) for m, index in indices if index is not None]
            expected = f"{len(vocabulary)} classes with {sum(map(len, vocabulary.synonyms))} names"
        else:
            raise ValueError(f"{source} {shape} does not name its rows: give their class names")
        layouts = [(m, index) for m, index in layouts if dim in (None, m.shape[1])]
        if not layouts:
            raise ValueError(
                f"{source} is {shape}; that does not fit {expected}" + (f" x {dim}" if dim else "")
            )
        if len(layouts) == 2:
            raise ValueError(
                f"{source} is {shape}, and both sides fit {expected}: give the dimension, or an index of"
                " the rows where that is the same"
            )
        embeddings, index = layouts[0]
        return cls(embeddings, index, synonyms=synonyms, unit=content.get("rows") != _MEANS, source=source)

    @property
    def dim(self) -> int:
        """D."""
        return self.embeddings.shape[1]

    def rows(self, vocabulary: Vocabulary) -> tuple[Tensor, Tensor]:
        """See `TextEmbedder.rows`; one row per class if the table has no synonyms.

        Raises:
            ValueError: If the table lacks names (the message has near matches), or has them for several
                classes.
        """
        found, classes, missing, several = [], [], [], []
        for i, name in self._requested(vocabulary):
            names = vocabulary.synonyms[i]
            vector = self._vectors.get(_key(names, None if self.by_class else name))
            similar = self._similar.get(canonical(name), []) if vector is None else [vector]
            if not similar:
                missing.append(name)
            elif any(not torch.equal(similar[0], other) for other in similar[1:]):
                several.append(name)
            else:
                found.append(similar[0])
                classes.append(i)
        if missing:
            raise ValueError(
                f"{self.source} has no row for {self._hints(missing)}; tools/make_text_table.py writes a "
                "table of any names, and a text tower needs none"
            )
        if several:
            raise ValueError(f"{self.source} has several classes of the name {', '.join(map(repr, several))}")
        return torch.stack(found), torch.tensor(classes)

    def _requested(self, vocabulary: Vocabulary) -> list[tuple[int, str]]:
        return list(enumerate(vocabulary.names)) if self.by_class else self.names(vocabulary)

    def _hints(self, missing: list[str]) -> str:
        known = (
            {names[0] for names in self.index.classes} if self.by_class else set(self.index.synonyms or ())
        )
        hints = []
        for name in missing[:20]:
            close = near(name, known)
            hints.append(f"{name!r} (near: {', '.join(map(repr, close))})" if close else repr(name))
        more = f" and {len(missing) - 20} more" if len(missing) > 20 else ""
        return ", ".join(hints) + more


def _key(names: Sequence[str], name: str | None) -> tuple[str, ...]:
    """Return the key of a class (all its names), or of a name in a class (display name and name)."""
    return tuple(map(canonical, names if name is None else (names[0], name)))


def find_table(name: str | Path, folder: str | Path, *, key: str) -> Path:
    """Find a table file by its path, or by its path relative to a folder.

    Args:
        name: path of the file.
        folder: folder to search if ``name`` is not a file.
        key: config key that names the table, for the error.

    Raises:
        FileNotFoundError: If there is no such file.
    """
    places = list(dict.fromkeys((Path(name).expanduser(), Path(folder) / name)))
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        raise FileNotFoundError(f"{key}: no text table {' or '.join(map(str, places))}")
    return found


def save_table(path: str | Path, bank: TextBank, vocabulary: Vocabulary) -> None:
    """Write the rows of a vocabulary, one per name; `TextTable.load` returns exactly the rows of the bank.

    The metadata has the index, the name of the model and the template set.

    Raises:
        ValueError: If the suffix is not .safetensors.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"a text table is written as .safetensors, not '{path.name}'")
    rows, _ = bank.rows(vocabulary)
    pairs = bank.names(vocabulary)
    index = {"classes": [vocabulary.names[i] for i, _ in pairs], "synonyms": [name for _, name in pairs]}
    metadata = {
        "index": json.dumps(index, ensure_ascii=False),
        "rows": _MEANS,
        "model": bank.clip.name,
        "template_set": bank.templates.name,
        "templates": json.dumps(bank.templates.templates, ensure_ascii=False),
    }
    with atomic_path(path) as temporary:
        save_file({"embeddings": rows.contiguous()}, temporary, metadata)


def _read(path: Path) -> tuple[Tensor, dict[str, Any]]:
    """Read the matrix and the metadata (`index`, `rows`)."""
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                keys = file.keys()
                tensors: dict[str, Any] = {key: file.get_tensor(key) for key in keys}
                metadata: dict[str, Any] = dict(file.metadata() or {})
            if "index" in metadata:
                metadata["index"] = json.loads(metadata["index"])
            return _matrix(tensors), metadata
        if path.suffix in (".pt", ".pth"):
            content = torch.load(path, map_location="cpu", weights_only=True)
            if isinstance(content, Tensor):
                return content, {}
            if not isinstance(content, dict):
                raise ValueError(f"expected a tensor or a dict, found {type(content).__name__}")
            return _matrix(content), content
        if path.suffix == ".npy":
            sidecar = path.with_name(path.name + ".json")
            index = {"index": json.loads(sidecar.read_text(encoding="utf-8"))} if sidecar.is_file() else {}
            return torch.from_numpy(np.load(path, allow_pickle=False)), index
    except Exception as error:  # libraries raise almost anything for damaged files
        raise ValueError(f"cannot read text table '{path}': {error}") from None
    raise ValueError(f"text table '{path}' is not a .safetensors, .pt, .pth or .npy file")


def _matrix(content: Mapping[str, Any]) -> Tensor:
    tensors = {key: value for key, value in content.items() if isinstance(value, Tensor)}
    if "embeddings" not in tensors and len(tensors) != 1:
        raise ValueError(f"expected a tensor 'embeddings', found {sorted(content)}")
    return tensors["embeddings"] if "embeddings" in tensors else next(iter(tensors.values()))
