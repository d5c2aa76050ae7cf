"""Vocabulary: the class names and synonyms that a model predicts.

Two names are equal if they agree up to case, spaces and underscores: "Potted plant", `potted_plant` and
`pottedplant`. The template set decides how a name is written in prompts (`templates.NAME_RULES`).
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from clipdense.clip.class_lists import class_list_path, read_class_list

__all__ = ["Vocabulary", "canonical", "near"]

_FORMAT = "clipdense-vocabulary"


def canonical(name: str) -> str:
    """Return the form of a name that decides equality: without case, white space and underscores."""
    return "".join(name.replace("_", " ").split()).casefold()


def near(name: str, known: Iterable[str], n: int = 3) -> list[str]:
    """Return up to ``n`` known names that are similar to ``name``, best first."""
    by_key = {canonical(k): k for k in known}
    return [by_key[key] for key in difflib.get_close_matches(canonical(name), by_key, n=n, cutoff=0.6)]


@dataclass(frozen=True)
class Vocabulary:
    """Classes in order, each with its synonyms; the first synonym is the display name.

    Attributes:
        synonyms: K tuples of names. A name may belong to several classes (ADE-847 has three "bag"), but no
            two classes may have all names in common.
        base: K flags, True for classes that were trained; None if base and novel are not distinguished.
        thing: K flags, True for things, False for stuff; None if they are not distinguished.

    Raises:
        ValueError: If there is no class, a name is empty, two classes are equal, or the flags have another
            length.
    """

    synonyms: tuple[tuple[str, ...], ...]
    base: tuple[bool, ...] | None = None
    thing: tuple[bool, ...] | None = None

    def __post_init__(self) -> None:
        if not self.synonyms:
            raise ValueError("a vocabulary needs at least one class")
        empty = [i for i, names in enumerate(self.synonyms) if not names or not all(map(canonical, names))]
        if empty:
            shown = ", ".join(f"{i} {list(self.synonyms[i])}" for i in empty[:10])
            raise ValueError(f"empty class names at positions {shown}")
        seen: dict[frozenset[str], int] = {}
        for i, names in enumerate(self.synonyms):
            first = seen.setdefault(frozenset(map(canonical, names)), i)
            if first != i:
                raise ValueError(f"classes {first} and {i} are the same: {list(names)}")
        for mask in ("base", "thing"):
            flags = getattr(self, mask)
            if flags is not None and len(flags) != len(self):
                raise ValueError(f"the {mask} mask has {len(flags)} entries for {len(self)} classes")

    @classmethod
    def from_names(
        cls,
        names: Sequence[str | Sequence[str]],
        *,
        separator: str | None = ",",
        novel: Iterable[int | str] | None = None,
    ) -> Vocabulary:
        """Create a vocabulary from a list of class names.

        Args:
            names: one entry per class: its names as one string, or as a list.
            separator: separates the names in a string ("building, edifice" is one class with two names, as in
                ADE-847); None takes each string as one name (OVSeg).
            novel: names or positions of the novel classes; all others are base. None: base and novel are
                not distinguished.

        Raises:
            ValueError: See `Vocabulary`; or if a novel name is not a class (the message has near matches).
        """
        if isinstance(names, str):
            raise ValueError(
                "expected a list of class names, not a string; `Vocabulary.parse` takes comma-separated names"
            )
        vocabulary = cls(tuple(_unique(_split(entry, separator)) for entry in names))
        return vocabulary if novel is None else vocabulary.with_novel(novel)

    @classmethod
    def from_categories(
        cls,
        categories: Iterable[Mapping[str, Any]],
        *,
        separator: str | None = ",",
        novel: Iterable[int | str] | None = None,
    ) -> Vocabulary:
        """Create a vocabulary from COCO, LVIS or panoptic categories, in the order of their ids.

        Categories have a `name` and optionally `id`, `synonyms` and `isthing`.

        Raises:
            ValueError: If a category has no name; see also `from_names`.
        """
        rows = list(categories)
        if not all("name" in row for row in rows):
            raise ValueError("every category needs a 'name'")
        if all(str(row.get("id")).isdecimal() for row in rows):  # other ids, such as words, have no order
            rows.sort(key=lambda row: int(row["id"]))
        entries = [[row["name"], *row["synonyms"]] if row.get("synonyms") else row["name"] for row in rows]
        vocabulary = cls.from_names(entries, separator=separator)
        if all("isthing" in row for row in rows):
            vocabulary = replace(vocabulary, thing=tuple(bool(row["isthing"]) for row in rows))
        return vocabulary if novel is None else vocabulary.with_novel(novel)

    @classmethod
    def from_metadata(cls, metadata: Any, *, separator: str | None = ",") -> Vocabulary:
        """Create a vocabulary from Detectron2 metadata.

        Reads `thing_classes` and `stuff_classes`, and optionally `novel_classes` or `base_classes` and
        `class_synonyms` (the names of each class, the display name first). If `stuff_classes` contains the
        things too (semantic and panoptic datasets), it lists the classes, and
        `thing_dataset_id_to_contiguous_id` (otherwise the names) tells which of them are things. If it does
        not (separated panoptic), things come first, and the placeholder "things" before the stuff is
        removed.

        Raises:
            ValueError: If both lists are missing, or `class_synonyms` has another length; see also
                `from_names`.
        """
        things = list(getattr(metadata, "thing_classes", ()))
        stuff = list(getattr(metadata, "stuff_classes", ()))
        thing: list[bool] | None
        if not things and not stuff:
            name = getattr(metadata, "name", metadata)
            raise ValueError(
                f"metadata of '{name}' has no thing_classes and no stuff_classes; is the dataset registered?"
            )
        if not things:
            names, thing = stuff, None
        elif not stuff:
            names, thing = things, [True] * len(things)
        elif set(things) <= set(stuff):
            ids = getattr(metadata, "thing_dataset_id_to_contiguous_id", None)
            members = set(ids.values()) if ids else {i for i, name in enumerate(stuff) if name in set(things)}
            names, thing = stuff, [i in members for i in range(len(stuff))]
        else:
            stuff = stuff[1:] if stuff[0] == "things" else stuff
            names, thing = things + stuff, [True] * len(things) + [False] * len(stuff)
        synonyms = getattr(metadata, "class_synonyms", names)
        if len(synonyms) != len(names):
            raise ValueError(f"class_synonyms name {len(synonyms)} classes, the metadata has {len(names)}")
        vocabulary = cls.from_names(
            synonyms, separator=separator, novel=getattr(metadata, "novel_classes", None)
        )
        if (known := getattr(metadata, "base_classes", None)) is not None:
            base = set(vocabulary._positions(known))
            vocabulary = replace(vocabulary, base=tuple(i in base for i in range(len(vocabulary))))
        return vocabulary if thing is None else replace(vocabulary, thing=tuple(thing))

    @classmethod
    def from_file(cls, path: str | Path, *, separator: str | None = ",") -> Vocabulary:
        """Create a vocabulary from a class-list file.

        `.json`: a list of names, a dict number -> name, a list of categories, a COCO, LVIS or panoptic
        annotation file, or the output of `to_json`. `.csv` and text files of any other ending: one class per
        line, its names separated by commas; see `clipdense.clip.class_lists.read_class_list`.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the layout is unknown, or the classes are invalid (see `Vocabulary`); the message
                names the file.
        """
        path = class_list_path(Path(path)) or Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"no class-list file '{path}'")
        try:
            return cls._from_list(read_class_list(path), separator)
        except (ValueError, KeyError, TypeError) as error:  # JSON errors are ValueErrors too
            raise ValueError(f"class-list file '{path}': {error}") from None

    @classmethod
    def _from_list(cls, content: Any, separator: str | None) -> Vocabulary:
        """Create a vocabulary from the content of a class-list file."""
        if isinstance(content, dict) and content.get("format") == _FORMAT:
            return cls._from_content(content)
        if isinstance(content, dict) and "categories" in content:
            content = content["categories"]
        if isinstance(content, dict) and content and all(str(key).isdigit() for key in content):
            content = [content[key] for key in sorted(content, key=int)]
        if isinstance(content, list) and content and all(isinstance(row, dict) for row in content):
            return cls.from_categories(content, separator=separator)
        if isinstance(content, list) and all(map(_is_entry, content)):
            return cls.from_names(content, separator=separator)
        raise ValueError(
            "expected a list of names, a list of categories with 'name', an annotation file with"
            " 'categories', or a saved vocabulary"
        )

    @classmethod
    def parse(cls, source: Vocabulary | str | Path | Sequence[str | Sequence[str]]) -> Vocabulary:
        """Create a vocabulary from user input.

        Args:
            source: "cat|kitten, red car" (commas separate classes, bars separate synonyms; a name in double
                quotes may contain both, as in 'dog, "black, white"'), the path of a class-list file, a list
                of names as in `from_names`, or a vocabulary, which is returned unchanged. A text that names
                an existing file, or ends as a list does (.txt, .json, .csv, .names), is a path; ``~`` and
                variables in it are expanded.

        Raises:
            FileNotFoundError: If the file does not exist.
            ValueError: See `from_file` and `from_names`.
        """
        if isinstance(source, Vocabulary):
            return source
        if isinstance(source, str | Path) and (path := class_list_path(source)) is not None:
            return cls.from_file(path)
        assert not isinstance(source, Path)  # a path object always names a list
        if isinstance(source, str):
            return cls.from_names(_split_text(source))
        return cls.from_names(source)

    def __len__(self) -> int:
        return len(self.synonyms)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    @property
    def names(self) -> tuple[str, ...]:
        """K display names."""
        return tuple(names[0] for names in self.synonyms)

    @cached_property
    def _classes(self) -> dict[str, list[int]]:
        """Classes by canonical name; classes with this display name come first."""
        classes: dict[str, list[int]] = {}
        for i, name in enumerate(self.names):
            classes.setdefault(canonical(name), []).append(i)
        for i, names in enumerate(self.synonyms):
            for key in map(canonical, names):
                if i not in classes.setdefault(key, []):
                    classes[key].append(i)
        return classes

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and canonical(name) in self._classes

    def index(self, name: str) -> int:
        """Return the class of a name; a display name takes precedence over a synonym.

        Raises:
            ValueError: If no class has the name (the message has near matches), or several classes have it.
        """
        found = self._classes.get(canonical(name), [])
        display = [i for i in found if canonical(self.names[i]) == canonical(name)] or found
        if len(display) == 1:
            return display[0]
        if display:
            several = ", ".join(f"{i} {list(self.synonyms[i])}" for i in display)
            raise ValueError(f"{name!r} names several classes: {several}")
        similar = " or ".join(map(repr, near(name, [s for names in self.synonyms for s in names])))
        hint = f"did you mean {similar}?" if similar else "nothing in it looks like that"
        raise ValueError(f"no class {name!r} among the vocabulary's {len(self)}; {hint}")

    def with_novel(self, novel: Iterable[int | str]) -> Vocabulary:
        """Return the same classes with the given ones (names or positions) novel and all others base."""
        ids = set(self._positions(novel))
        return replace(self, base=tuple(i not in ids for i in range(len(self))))

    def with_base_from(self, training: Vocabulary) -> Vocabulary:
        """Return the same classes; a class is base if it shares a name with a base class of ``training``."""
        flags = training.base or (True,) * len(training)
        known = {canonical(s) for i, names in enumerate(training.synonyms) if flags[i] for s in names}
        return replace(self, base=tuple(any(canonical(s) in known for s in names) for names in self.synonyms))

    def subset(self, classes: Iterable[int | str]) -> Vocabulary:
        """Return some of the classes, by position or name, in the given order, with their flags."""
        ids = self._positions(classes)
        return Vocabulary(
            tuple(self.synonyms[i] for i in ids),
            None if self.base is None else tuple(self.base[i] for i in ids),
            None if self.thing is None else tuple(self.thing[i] for i in ids),
        )

    def _positions(self, classes: Iterable[int | str]) -> list[int]:
        positions = [self.index(c) if isinstance(c, str) else c for c in classes]
        if wrong := [i for i in positions if not 0 <= i < len(self)]:
            raise ValueError(f"no classes {wrong} in a vocabulary of {len(self)}")
        return positions

    def to_json(self) -> str:
        """Serialise the vocabulary for a checkpoint or a file; `from_json` and `from_file` read it."""
        content = {"format": _FORMAT, "synonyms": self.synonyms, "base": self.base, "thing": self.thing}
        return json.dumps(content, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Vocabulary:
        """Read the output of `to_json`.

        Raises:
            ValueError: If the text is not a serialised vocabulary.
        """
        content = json.loads(text)
        if not isinstance(content, dict) or content.get("format") != _FORMAT:
            raise ValueError("this text is not a saved vocabulary")
        return cls._from_content(content)

    @classmethod
    def _from_content(cls, content: Mapping[str, Any]) -> Vocabulary:
        base, thing = content["base"], content["thing"]
        return cls(
            tuple(tuple(names) for names in content["synonyms"]),
            None if base is None else tuple(base),
            None if thing is None else tuple(thing),
        )

    def fingerprint(self) -> str:
        """Hash names, synonyms, order and flags."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:16]


def _is_entry(entry: Any) -> bool:
    return isinstance(entry, str) or (isinstance(entry, list) and all(isinstance(n, str) for n in entry))


def _split(entry: str | Sequence[str], separator: str | None) -> Sequence[str]:
    if not isinstance(entry, str):
        return entry
    # a trailing separator ("sky,") does not add an empty name; a class without any name is an error
    return [name for name in entry.split(separator) if name.strip()] if separator else [entry]


def _split_text(text: str) -> list[list[str]]:
    """Split "cat|kitten, red car" into classes and their names; double quotes protect commas and bars.

    Raises:
        ValueError: If a quotation does not end.
    """
    classes: list[list[str]] = [[]]
    name, quoted = "", False
    for character in text + ",":
        if character == '"':
            quoted = not quoted
        elif character in ",|" and not quoted:
            if name.strip():
                classes[-1].append(name.strip())
            name = ""
            if character == ",":
                classes.append([])
        else:
            name += character
    if quoted:
        raise ValueError(f'a double quote in {text!r} has no counterpart; quote a whole name: "black, white"')
    return [names for names in classes if names]


def _unique(names: Iterable[str]) -> tuple[str, ...]:
    """Strip names and remove repetitions (compared by `canonical`), in order."""
    unique: dict[str, str] = {}
    for name in names:
        unique.setdefault(canonical(name), name.strip())
    return tuple(unique.values())
