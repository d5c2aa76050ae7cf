"""Class names shared by the datasets of a configuration, and the vocabulary of one dataset."""

from clipdense.clip.vocabulary import Vocabulary
from clipdense.data.checks import check_dataset_names, dataset_classes
from clipdense.data.datasets.synonyms import add_synonyms

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

__all__ = ["class_names", "dataset_vocabulary", "evaluation_vocabulary"]


def class_names(cfg: CfgNode, kind: str = "thing_classes") -> list[str]:
    """Return the class names that ``DATASETS.TRAIN`` and ``DATASETS.TEST`` share.

    Args:
        cfg: whose datasets are registered.
        kind: metadata entry with the names: "thing_classes" or "stuff_classes".

    Raises:
        ValueError: If there is no dataset, one is not registered or has no such classes, or the class lists
            differ.
    """
    datasets = [*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST]
    check_dataset_names(datasets)
    first: list[str] = []
    for name in datasets:
        classes = dataset_classes(name, kind.removesuffix("_classes"))
        if not classes:
            raise ValueError(f"dataset {name} has no {kind}")
        first = first or classes
        if classes != first:
            differing = [f"{a!r} / {b!r}" for a, b in zip(first, classes, strict=False) if a != b][:3]
            raise ValueError(
                f"datasets {datasets[0]} ({len(first)} classes) and {name} ({len(classes)}) have different "
                f"class lists; the first differences: {', '.join(differing) or 'their lengths'}"
            )
    return first


def dataset_vocabulary(cfg: CfgNode, name: str) -> Vocabulary:
    """Build the vocabulary of a registered dataset.

    Args:
        cfg: reads ``DATASETS.SPLIT_NAMES``: whether commas in a class name separate synonyms; and
            ``DATASETS.SYNONYMS``: whether standard datasets have more names.
        name: of the dataset.

    Raises:
        ValueError: If the dataset has no class names, or two equal ones.
    """
    metadata = MetadataCatalog.get(name)
    if not (metadata.get("thing_classes") or metadata.get("stuff_classes")):
        DatasetCatalog.get(name)  # loading a COCO file sets its class names
    vocabulary = Vocabulary.from_metadata(metadata, separator="," if cfg.DATASETS.SPLIT_NAMES else None)
    return add_synonyms(vocabulary) if cfg.DATASETS.SYNONYMS else vocabulary


def evaluation_vocabulary(cfg: CfgNode, name: str) -> tuple[Vocabulary, list[int] | None]:
    """Return the classes that an open-vocabulary model predicts on a dataset.

    These are the dataset's own, unless its metadata has ``vocabulary_classes`` (the classes to predict) and
    ``vocabulary_mapping`` (the class of the dataset for each of them).

    Args:
        cfg: see `dataset_vocabulary`.
        name: of the dataset.

    Returns:
        The classes, and the class of the dataset for each; None if they are the same.
    """
    metadata = MetadataCatalog.get(name)
    if not metadata.get("vocabulary_classes"):
        return dataset_vocabulary(cfg, name), None
    separator = "," if cfg.DATASETS.SPLIT_NAMES else None
    vocabulary = Vocabulary.from_names(metadata.vocabulary_classes, separator=separator)
    vocabulary = add_synonyms(vocabulary) if cfg.DATASETS.SYNONYMS else vocabulary
    return vocabulary, list(metadata.vocabulary_mapping)
