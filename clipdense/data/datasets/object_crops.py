"""Datasets of the objects of another dataset, for image classification."""

from functools import partial

from clipdense.data.datasets.registration import register_once
from clipdense.data.object_crops import object_crops

from detectron2.data import DatasetCatalog, MetadataCatalog

__all__ = ["register_object_crops"]

_COPIED = (
    "thing_classes",
    "class_synonyms",
    "base_classes",
    "novel_classes",
    "novel_kinds",
    "class_attributes",
    "made_at_first_use",
)


def register_object_crops(name: str, dataset: str, shots: str = "0", seed: str = "1") -> None:
    """Register the objects of a dataset with boxes as images of one class each, see `object_crops`.

    Args:
        name: of the dataset.
        dataset: a registered dataset with thing classes; its class lists become those of the new one.
        shots: number of objects of each class; "0": all.
        seed: of the choice of the shots.

    Raises:
        ValueError: If the name is in use, the dataset is not registered or has no thing classes, or a number
            is malformed.
    """
    if dataset not in DatasetCatalog.list():
        raise ValueError(f"object crops {name}: {dataset} is not a registered dataset")
    metadata = MetadataCatalog.get(dataset)
    if not metadata.get("thing_classes"):
        raise ValueError(f"object crops {name}: dataset {dataset} has no thing_classes")
    if not (shots.isdecimal() and seed.isdecimal()):
        raise ValueError(f"object crops {name}: shots {shots!r} and seed {seed!r} must be whole numbers")
    register_once(
        name,
        partial(object_crops, dataset, int(shots), int(seed)),
        {"object_crops": f"{dataset}:{shots}:{seed}"},
        {
            "evaluator_type": "crop_classification",
            **{key: metadata.get(key) for key in _COPIED if metadata.get(key) is not None},
        },
    )
