"""A user's own label maps as a dataset of semantic segmentation."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from clipdense.data.datasets.converted import converted_labels, void_label
from clipdense.data.datasets.images import EXTENSIONS
from clipdense.data.datasets.label_tables import UNKNOWN, ClassTable, read_class_table
from clipdense.data.datasets.layouts import DatasetDicts
from clipdense.data.datasets.registration import register_once
from clipdense.data.validation.report import DataError
from clipdense.files import read_text

__all__ = ["LABEL_EXTENSIONS", "register_label_maps", "register_paired_maps"]

logger = logging.getLogger(__name__)

LABEL_EXTENSIONS = (".png", ".tif", ".tiff", ".bmp")
_ZERO, _UNKNOWN = "zero_unlabelled", "unknown_ignored"

Pairs = Mapping[str, tuple[Path, Path]]
"""Key of an image -> its image and its label map."""


@dataclass(frozen=True)
class _Rules:
    """How the values of label maps become classes.

    Attributes:
        table: all classes of the file.
        ignored: value, or index of the class with colours, of pixels without a class; None for none.
        zero_unlabelled: whether 0 is unlabelled and classes are numbered from 1.
        unknown_ignored: whether colours that are no class's are unlabelled.
    """

    table: ClassTable
    ignored: int | None = None
    zero_unlabelled: bool = False
    unknown_ignored: bool = False

    @property
    def names(self) -> list[str]:
        """Names of the classes that are left."""
        dropped = self.ignored if self.table.colours is not None else None
        return [name for k, name in enumerate(self.table.names) if k != dropped]

    @property
    def void(self) -> int:
        """Label of pixels without a class."""
        return void_label(len(self.names))

    @property
    def is_plain(self) -> bool:
        """Whether the files hold the labels already."""
        return self.table.colours is None and not self.zero_unlabelled and self.ignored in (None, self.void)

    def convert(self, path: Path) -> npt.NDArray[np.int64]:
        """Read a label map as labels from 0, with `void` for pixels without a class.

        Raises:
            DataError: If it has a value or colour that is no class's; names it.
        """
        labels = self.table.read(path)
        ignored = labels == self.void
        if self.ignored is not None:
            ignored |= labels == self.ignored
        if self.unknown_ignored:
            ignored |= labels == UNKNOWN
        if self.table.colours is not None and self.ignored is not None:
            labels = labels - (labels > self.ignored)
        if self.zero_unlabelled:
            ignored |= labels == 0
            labels = labels - 1
        wrong = ~ignored & ((labels < 0) | (labels >= len(self.names)))
        if wrong.any():
            raise DataError(f"{path}: {int(wrong.sum())} pixels {self._describe(path, wrong)}")
        return np.where(ignored, self.void, labels)

    def _describe(self, path: Path, wrong: npt.NDArray[np.bool_]) -> str:
        if self.table.colours is None:
            values = np.unique(self.table.read(path)[wrong])[:5].tolist()
            first = int(self.zero_unlabelled)
            return (
                f"have the values {', '.join(map(str, values))}; expected {first} to "
                f"{len(self.names) - 1 + first} for the {len(self.names)} classes"
            )
        return (
            "have a colour that is not in the list of classes (pixels blended by resizing or JPEG have one); "
            f"add it to the list, or add the field {_UNKNOWN} to leave them out"
        )


def register_label_maps(name: str, image_root: str, label_root: str, classes: str, *options: str) -> None:
    """Register images with label maps of the same stem, in equal subfolders.

    Label maps in colours, with an ignored value other than 255, or in which 0 is unlabelled are converted
    into the cache folder when the dataset is first loaded, and again when they change. There, pixels without
    a class have the label 255 (65535 if there are more than 255 classes).

    Args:
        name: of the dataset.
        image_root: folder of the images; those without a label map are left out.
        label_root: folder of the label maps: PNG, TIFF or BMP files of one channel or with a palette, whose
            values (or palette indices) are class numbers from 0; or pictures in the colours of the classes.
        classes: file with the class names in the order of these numbers, or with names and colours, see
            `read_class_table`.
        options: any of: the value of pixels without a class (default 255); with colours, the name of a class
            to leave out; ``zero_unlabelled``: 0 stands for no class, and the first class is 1;
            ``unknown_ignored``: pixels of another colour have no class; a ``.txt`` file with the names of the
            images to use, one a line, without suffix.

    Raises:
        FileNotFoundError: If a folder or the file does not exist.
        ValueError: If the name is in use, the file has no class names, or an option is unknown.
    """
    for what, path in (("image folder", image_root), ("folder of label maps", label_root)):
        if not os.path.isdir(path):
            raise FileNotFoundError(f"dataset {name}: no {what} {path}")
    if not os.path.isfile(classes):
        raise FileNotFoundError(
            f"dataset {name}: no file of class names {classes}; write one name a line, or a JSON list"
        )
    lists = [option for option in options if option.endswith(".txt")]
    rules = _rules(name, read_class_table(Path(classes)), [o for o in options if o not in lists])
    for path in lists:
        if not os.path.isfile(path):
            raise FileNotFoundError(f"dataset {name}: no list of images {path}")
    source = {"image_root": image_root, "sem_seg_root": label_root, "classes_file": classes}
    pairs = partial(_find_pairs, name, Path(image_root), Path(label_root), lists)
    _register(name, pairs, rules, source | {"label_options": ":".join(options)})


def register_paired_maps(name: str, pairs: Pairs, table: ClassTable, source: dict[str, str]) -> None:
    """Register images with their label maps; 255 stands for no class.

    Args:
        name: of the dataset.
        pairs: images and label maps by key.
        table: the classes.
        source: see `register_once`.
    """
    _register(name, lambda: pairs, _Rules(table, unknown_ignored=True), source)


def _register(name: str, pairs: Callable[[], Pairs], rules: _Rules, source: dict[str, str]) -> None:
    register_once(
        name,
        partial(_load, name, pairs, rules),
        source,
        {"evaluator_type": "sem_seg", "ignore_label": rules.void, "stuff_classes": rules.names},
    )


def _rules(name: str, table: ClassTable, options: list[str]) -> _Rules:
    """Read the options of a dataset, see `register_label_maps`."""
    ignored: int | None = None
    for option in options:
        if option in (_ZERO, _UNKNOWN):
            continue
        if table.colours is None and option.isdecimal():
            ignored = int(option)
        elif table.colours is not None and option in table.names:
            ignored = table.names.index(option)
        else:
            kind = "a number such as 255" if table.colours is None else f"one of {', '.join(table.names)}"
            raise ValueError(
                f"dataset {name}: unknown option {option!r}; expected the ignored value ({kind}), {_ZERO}, "
                f"{_UNKNOWN}, or a .txt list of images"
            )
    if table.colours is not None and _ZERO in options:
        raise ValueError(
            f"dataset {name}: {_ZERO} is for label maps with numbers, but the classes have colours; name the "
            "class to leave out instead"
        )
    return _Rules(table, ignored, _ZERO in options, _UNKNOWN in options)


def _load(name: str, pairs: Callable[[], Pairs], rules: _Rules) -> DatasetDicts:
    found = pairs()
    maps = {key: labels for key, (_, labels) in found.items()}
    if not rules.is_plain:
        roots = os.path.commonpath([path.parent.absolute() for path in maps.values()])
        maps = converted_labels("labels", [roots, repr(rules)], maps, rules.convert, rules.void > 255)
    logger.info("Found %d images with label maps of %s", len(found), name)
    return [
        {"file_name": str(image), "image_id": key, "sem_seg_file_name": str(maps[key])}
        for key, (image, _) in sorted(found.items())
    ]


def _find_pairs(name: str, image_root: Path, label_root: Path, lists: list[str]) -> Pairs:
    """Find the label maps and their images by their path below the two folders, without suffix."""
    images = _files(name, image_root, EXTENSIONS)
    labels = _files(name, label_root, LABEL_EXTENSIONS)
    if not labels:
        raise DataError(f"dataset {name}: no label map ({', '.join(LABEL_EXTENSIONS)}) in {label_root}")
    chosen = [line.strip() for path in lists for line in read_text(path).splitlines() if line.strip()]
    if unknown := [key for key in chosen if key not in labels]:
        raise DataError(f"dataset {name}: {', '.join(lists)}: no label map {unknown[0]} in {label_root}")
    if chosen:
        labels = {key: labels[key] for key in chosen}
    if missing := sorted(labels.keys() - images.keys()):
        raise DataError(
            f"dataset {name}: {len(missing)} of {len(labels)} label maps have no image in {image_root}, "
            f"first {labels[missing[0]]}; images and label maps need equal names, except the suffix"
        )
    return {key: (images[key], labels[key]) for key in labels}


def _files(name: str, root: Path, suffixes: tuple[str, ...]) -> dict[str, Path]:
    """Find files by their path below the root, without suffix."""
    found: dict[str, Path] = {}
    for path in sorted(p for p in root.rglob("*") if p.suffix.lower() in suffixes):
        key = path.relative_to(root).with_suffix("").as_posix()
        if key in found:
            raise DataError(f"dataset {name}: {found[key]} and {path} have the same name; remove one of them")
        found[key] = path
    return found
