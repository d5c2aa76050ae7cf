"""More names for the classes of standard datasets, for models that use the best name of a class."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

from clipdense.clip.vocabulary import Vocabulary, canonical
from clipdense.data.datasets.open_semantic import PASCAL_CONTEXT_59, PASCAL_CONTEXT_459
from clipdense.data.datasets.standard import ADE20K_CLASSES, MAPILLARY_CLASSES, VOC_CLASSES

from detectron2.data.datasets.builtin_meta import CITYSCAPES_CATEGORIES, COCO_CATEGORIES

__all__ = ["add_synonyms"]

_BACKGROUND = "background"


def add_synonyms(vocabulary: Vocabulary, *, keep: bool = False) -> Vocabulary:
    """Give the classes of a standard dataset the names of ``synonyms.json``.

    There are lists for COCO panoptic, ADE20K (150), Cityscapes, Mapillary Vistas 1.2, PASCAL-Context (59 and
    459) and Pascal VOC; the last two may come after a class called background. Other vocabularies
    stay as they are; so do the 847 classes of ADE20K, whose names are lists of synonyms already.

    A name that several classes would have stays with the class that is called so, and is dropped otherwise.

    Args:
        vocabulary: classes of a dataset, in its order.
        keep: append the names that the vocabulary has, so that its classes are found by both.

    Source: names of the datasets; synonyms of LVIS v1 (Gupta et al., CVPR 2019) and ADE20K (Zhou et al.,
        CVPR 2017), where they mean the same. The lists of OpenSeg (Ghiasi et al., ECCV 2022), which FC-CLIP
        and ODISE publish results with, have other synonyms.
    """
    names = [_first(name) for name in vocabulary.names]
    background = names[0] == _BACKGROUND
    found = _lists().get(tuple(names[background:]))
    if found is None:
        return vocabulary
    long = [[_BACKGROUND]] * int(background) + [list(entry) for entry in found]
    first = {canonical(entry[0]) for entry in long}
    count = Counter(canonical(name) for entry in long for name in entry)
    kept = [
        (entry[0], *(n for n in entry[1:] if canonical(n) not in first and count[canonical(n)] == 1))
        for entry in long
    ]
    if keep:
        kept = [tuple(dict.fromkeys([*a, *b])) for a, b in zip(kept, vocabulary.synonyms, strict=True)]
    return replace(vocabulary, synonyms=tuple(kept))


def _first(name: str) -> str:
    """Return the first of the names that commas separate."""
    return name.split(",")[0].strip()


@cache
def _lists() -> dict[tuple[str, ...], tuple[tuple[str, ...], ...]]:
    """Return the names of the classes of each dataset: published first names -> all names of each class."""
    content = json.loads(Path(__file__).with_name("synonyms.json").read_text("utf-8"))
    published: list[tuple[str, Sequence[str]]] = [
        ("coco_panoptic", [row["name"] for row in COCO_CATEGORIES]),
        ("ade20k", [_first(name) for name in ADE20K_CLASSES]),
        ("cityscapes", [row["name"] for row in CITYSCAPES_CATEGORIES if row["trainId"] != 255]),
        ("mapillary_vistas", MAPILLARY_CLASSES),
        ("pascal_context", PASCAL_CONTEXT_59),
        ("pascal_context", PASCAL_CONTEXT_459),
        ("pascal_voc", VOC_CLASSES),
    ]
    lists = {}
    for key, classes in published:
        known = content[key] if key == "ade20k" else content["common"] | content[key]
        lists[tuple(classes)] = tuple(
            tuple(name.strip() for name in known.get(n, n).split(",")) for n in classes
        )
    return lists
