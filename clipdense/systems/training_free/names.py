"""Class names of the published evaluation protocols, in the order of the datasets' classes."""

from __future__ import annotations

import json
from pathlib import Path

from clipdense.clip.vocabulary import Vocabulary
from clipdense.data.classes import dataset_vocabulary

from detectron2.config import CfgNode

__all__ = ["NAME_LISTS", "name_list", "protocol_names"]

_FILE = Path(__file__).with_name("class_names.json")

NAME_LISTS: tuple[str, ...] = tuple(k for k in json.loads(_FILE.read_text("utf-8")) if k != "about")
"""Names of the lists."""


def name_list(name: str) -> Vocabulary:
    """Return a published list; bars in the file separate the names of a class.

    Raises:
        ValueError: If there is no such list.
    """
    if name not in NAME_LISTS:
        raise ValueError(f"unknown list of class names {name!r}; known: {', '.join(NAME_LISTS)}")
    return Vocabulary.from_names(json.loads(_FILE.read_text("utf-8"))[name], separator="|")


def protocol_names(cfg: CfgNode) -> dict[tuple[tuple[str, ...], ...], Vocabulary]:
    """Return the names of ``MODEL.ZERO_SHOT.CLASS_NAMES`` for the vocabularies of ``DATASETS.TEST``.

    Only these vocabularies get other names; one that a user sets keeps its own.

    Raises:
        ValueError: If the list is unknown, or has another number of classes than a dataset.
    """
    if not cfg.MODEL.ZERO_SHOT.CLASS_NAMES:
        return {}
    names = name_list(cfg.MODEL.ZERO_SHOT.CLASS_NAMES)
    found = {}
    for dataset in cfg.DATASETS.TEST:
        vocabulary = dataset_vocabulary(cfg, dataset)
        if len(vocabulary) != len(names):
            raise ValueError(
                f"MODEL.ZERO_SHOT.CLASS_NAMES: the list {cfg.MODEL.ZERO_SHOT.CLASS_NAMES} has {len(names)} "
                f"classes, and dataset {dataset} {len(vocabulary)}: choose the list of the dataset"
            )
        found[vocabulary.synonyms] = names
    return found
