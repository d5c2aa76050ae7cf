"""Vocabulary of the training data of a config."""

from __future__ import annotations

from clipdense.clip.vocabulary import Vocabulary
from clipdense.data.checks import check_dataset_names
from clipdense.data.classes import dataset_vocabulary

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog

__all__ = ["label_vocabulary"]


def label_vocabulary(cfg: CfgNode) -> Vocabulary | None:
    """Return the classes of DATASETS.TRAIN, with base flags if the metadata has them; None without datasets.

    Raises:
        ValueError: If a dataset is unknown, or if the datasets have different classes.
    """
    names = list(cfg.DATASETS.TRAIN)
    if not names:
        return None
    if without_metadata := [name for name in names if name not in MetadataCatalog.list()]:
        check_dataset_names(without_metadata)
    vocabularies = [dataset_vocabulary(cfg, name) for name in names]
    for name, vocabulary in zip(names, vocabularies, strict=True):
        if vocabulary != vocabularies[0]:
            raise ValueError(
                f"DATASETS.TRAIN: {names[0]} and {name} have different classes ({len(vocabularies[0])} and "
                f"{len(vocabulary)}); the labels of one training run need one class list"
            )
    return vocabularies[0]
