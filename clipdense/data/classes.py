"""Class names shared by the datasets of a configuration, and the vocabulary of one dataset."""

from clipdense.clip.vocabulary import Vocabulary
from clipdense.data.checks import check_dataset_names, dataset_classes

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

__all__ = ["class_names", "dataset_vocabulary"]


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

    It holds the classes of the dataset, or those of the metadata entry ``vocabulary_classes``: the classes to
    predict, whose classes in the dataset are listed in ``vocabulary_mapping``.

    Args:
        cfg: reads ``DATASETS.SPLIT_NAMES``: whether commas in a class name separate synonyms.
        name: of the dataset.

    Raises:
        ValueError: If the dataset has no class names, or two equal ones.
    """
    metadata, separator = MetadataCatalog.get(name), "," if cfg.DATASETS.SPLIT_NAMES else None
    if predicted := metadata.get("vocabulary_classes"):
        return Vocabulary.from_names(predicted, separator=separator)
    if not (metadata.get("thing_classes") or metadata.get("stuff_classes")):
        DatasetCatalog.get(name)  # loading a COCO file sets its class names
    return Vocabulary.from_metadata(metadata, separator=separator)
