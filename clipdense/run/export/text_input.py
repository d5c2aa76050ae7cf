"""Text inputs of an exported file from a table of class names, without torch."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

try:
    from clipdense.run.export.file_metadata import FileMetadata
except ImportError:  # copied into a folder of its own
    sys.path.insert(0, str(Path(__file__).parent))
    from file_metadata import FileMetadata  # type: ignore[import-not-found, no-redef]

__all__ = ["FORMAT_KEY", "TextInput", "canonical", "read_text_input"]

FORMAT_KEY = "clipdense_text_input"
"""Metadata of a table that holds the inputs of one exported file as they are."""

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class TextInput:
    """Classes of an exported file.

    Attributes:
        classes: K display names.
        arrays: inputs of the file by name: ``text`` and, as the convention needs, ``synonyms`` or
            ``crop_text``.
        base: (K,) bool, the classes that the model was trained on.
        things: indices of countable things; None if the table does not tell.
    """

    classes: tuple[str, ...]
    arrays: dict[str, Array]
    base: Array
    things: tuple[int, ...] | None = None


def canonical(name: str) -> str:
    """Return the form of a name that decides equality: without case, white space and underscores."""
    return "".join(name.replace("_", " ").split()).casefold()


def read_text_input(path: str | Path, metadata: FileMetadata) -> TextInput:
    """Read the classes of an exported file from a table.

    Args:
        path: .safetensors of ``tools/make_text_table.py`` (a row per name), or of ``clipdense export
            --text-output`` (the inputs of this file).
        metadata: of the exported file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file has constant classes, or the table is damaged or does not fit.
    """
    if metadata.text == "none":
        raise ValueError(
            f"the classes of a {metadata.system} are constants of its file ({len(metadata.classes)} "
            "classes): leave out the text table"
        )
    if not Path(path).is_file():
        raise FileNotFoundError(f"no text table '{path}'")
    tensors, header = _read(path)
    own = header.get(FORMAT_KEY)
    if own is None and metadata.own_text:
        raise ValueError(
            f"text table '{path}' holds plain prompts, but {metadata.system} has learned its own: write the "
            "table with clipdense export --vocabulary ... --text-output FILE"
        )
    names = _names(header, path)
    if own is not None:
        if own != metadata.text:
            raise ValueError(f"text table '{path}' is for files with text '{own}', not '{metadata.text}'")
        arrays, groups = tensors, names
    else:
        arrays, groups = _from_rows(tensors, names, metadata, path)
    _check(arrays, len(groups), metadata, path)
    trained = set(metadata.base_names)
    base = np.array([any(canonical(name) in trained for name in group) for group in groups], bool)
    return TextInput(tuple(group[0] for group in groups), arrays, base, _things(header, len(groups), path))


def _read(path: str | Path) -> tuple[dict[str, Array], dict[str, str]]:
    from safetensors import safe_open

    try:
        with safe_open(str(path), "np") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            return tensors, dict(file.metadata() or {})
    except Exception as error:  # the library raises its own kinds for damaged files
        raise ValueError(f"cannot read text table '{path}': {error}") from None


def _names(header: dict[str, str], path: str | Path) -> list[list[str]]:
    """Return the names of each class (own format), or [class, name] of each row."""
    try:
        if FORMAT_KEY in header:
            names = json.loads(header["names"])
        else:
            index = json.loads(header["index"])
            classes = index["classes"]
            names = [list(pair) for pair in zip(classes, index.get("synonyms") or classes, strict=True)]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"text table '{path}' does not name its rows ({error})") from None
    if not names or not all(
        isinstance(group, list) and group and all(isinstance(name, str) for name in group) for group in names
    ):
        raise ValueError(f"text table '{path}': its names are not lists of words")
    return names


def _things(header: dict[str, str], count: int, path: str | Path) -> tuple[int, ...] | None:
    if "things" not in header:
        return None
    try:
        things = json.loads(header["things"])
        if all(type(k) is int and 0 <= k < count for k in things):
            return tuple(things)
    except (TypeError, ValueError):
        pass
    raise ValueError(f"text table '{path}': its things are not indices of its {count} classes")


def _from_rows(
    tensors: dict[str, Array], pairs: list[list[str]], metadata: FileMetadata, path: str | Path
) -> tuple[dict[str, Array], list[list[str]]]:
    """Make the inputs from a row per name, and return them with the names of each class."""
    if "embeddings" not in tensors or len(tensors["embeddings"]) != len(pairs):
        raise ValueError(f"text table '{path}' has no row for each of its {len(pairs)} names")
    rows = tensors["embeddings"].astype(np.float64)
    members: dict[str, list[int]] = {}
    for i, (shown, _) in enumerate(pairs):
        members.setdefault(shown, []).append(i)
    groups = [[pairs[i][1] for i in rows_of] for rows_of in members.values()]
    if metadata.text == "names":
        width = max(map(len, members.values()))
        synonyms = np.array([ids + ids[:1] * (width - len(ids)) for ids in members.values()], np.int64)
        return {"text": _unit(rows), "synonyms": synonyms}, groups
    text = _unit(np.stack([rows[ids].sum(0) for ids in members.values()]))
    if metadata.text == "prompts":
        if metadata.prompts != 1:
            raise ValueError(
                f"the file reads {metadata.prompts} prompts of each class, and text table '{path}' holds "
                "their mean: write the table with clipdense export --vocabulary ... --text-output FILE"
            )
        first = _unit(np.stack([rows[ids[0]] for ids in members.values()]))
        return {"text": first[:, None]}, groups
    return {"text": text, "crop_text": text}, groups


def _check(arrays: dict[str, Array], count: int, metadata: FileMetadata, path: str | Path) -> None:
    text = arrays.get("text")
    if text is None or not np.isfinite(text).all() or text.shape[-1] != metadata.embed_dim:
        found = "none" if text is None else f"embeddings {text.shape}"
        raise ValueError(
            f"text table '{path}' has {found}; the file reads finite rows of {metadata.embed_dim} numbers, "
            f"of the text tower '{metadata.clip}'"
        )
    if metadata.num_classes and count != metadata.num_classes:
        raise ValueError(
            f"text table '{path}' has {count} classes, and the file is built for {metadata.num_classes}: the "
            "number of classes is a size of its weights"
        )
    if metadata.max_classes and count > metadata.max_classes:
        raise ValueError(
            f"text table '{path}' has {count} classes; the file takes at most {metadata.max_classes}"
        )


def _unit(rows: Array) -> Array:
    norms = np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), 1e-12)
    return (rows / norms).astype(np.float32)
