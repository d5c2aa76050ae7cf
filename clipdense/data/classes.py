"""The class lists of data sets, and that which the data sets of a config share."""

from clipdense.clip.vocabulary import Vocabulary
from clipdense.data.checks import check_dataset_names, dataset_classes
from clipdense.data.datasets import register_from_config

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

__all__ = ["class_names", "dataset_vocabulary"]


def class_names(cfg: CfgNode, kind: str = "thing_classes") -> list[str]:
    """Names of the classes of ``DATASETS.TRAIN`` and ``DATASETS.TEST``.

    Args:
        kind: the metadata entry that lists them, "thing_classes" or "stuff_classes".

    Raises:
        ValueError: no data set, an unknown one, one without such classes, or lists that differ.
    """
    register_from_config(cfg)
    datasets = [*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST]
    check_dataset_names(datasets)
    first: list[str] = []
    for name in datasets:
        classes = dataset_classes(name, kind.removesuffix("_classes"))
        if not classes:
            raise ValueError(f"data set {name} has no {kind}")
        first = first or classes
        if classes != first:
            differing = [f"{a!r} / {b!r}" for a, b in zip(first, classes, strict=False) if a != b][:3]
            raise ValueError(
                f"data sets {datasets[0]} ({len(first)} classes) and {name} ({len(classes)}) have different "
                f"class lists; the first differences: {', '.join(differing) or 'their lengths'}"
            )
    return first


def dataset_vocabulary(cfg: CfgNode, name: str) -> Vocabulary:
    """The vocabulary of a registered data set; ``DATASETS.SPLIT_NAMES`` says what commas in names mean.

    Raises:
        ValueError: a data set without classes, or with two that are the same.
    """
    metadata = MetadataCatalog.get(name)
    if not (metadata.get("thing_classes") or metadata.get("stuff_classes")):
        DatasetCatalog.get(name)  # a COCO file's classes are known once it has been read
    return Vocabulary.from_metadata(metadata, separator="," if cfg.DATASETS.SPLIT_NAMES else None)
