"""Classes of closed-vocabulary weights against those of a dataset, by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch

from clipdense.clip.vocabulary import canonical
from clipdense.data.checks import dataset_classes
from clipdense.data.heads import HeadClasses

from detectron2.data import MetadataCatalog

__all__ = ["class_mapping", "map_classes", "trained_classes"]

_MAPPED_BY: dict[Literal["thing", "stuff"], tuple[str, ...]] = {
    "thing": ("coco", "lvis"),
    "stuff": ("sem_seg", "cityscapes_sem_seg"),
}
"""Tasks (``evaluator_type``) whose outputs `map_classes` maps."""


def trained_classes(metadata: Mapping[str, Any], kind: str) -> list[str] | None:
    """Return the class names that a weight file was trained on; None if it does not list them.

    Args:
        metadata: of a training checkpoint or a converted file, with ``thing_classes`` or ``stuff_classes``.
        kind: "thing" or "stuff".
    """
    names = metadata.get(f"{kind}_classes")
    return list(names) if names else None


def class_mapping(
    heads: Sequence[tuple[HeadClasses, int | None]] | None,
    metadata: Mapping[str, Any],
    dataset: str,
    source: str,
) -> list[int] | None:
    """Compare the classes of closed-vocabulary heads with those of a dataset.

    Args:
        heads: the heads and the numbers of their classes (None if not known); None for a model that is not
            known, whose outputs have the classes that the dataset evaluates.
        metadata: of the weight file, see `trained_classes`; empty if it is not known.
        dataset: name of a registered dataset.
        source: the weight file, for the message.

    Returns:
        Class of the model -> class of the dataset, if the dataset has the same names in another order; None
        if the order is the same, or the classes are not known.

    Raises:
        ValueError: If the names differ, a head has another number of classes, or the order differs in a task
            for which outputs cannot be mapped.
    """
    task = MetadataCatalog.get(dataset).get("evaluator_type")
    if heads is None:
        heads = [(HeadClasses("", kind), None) for kind, tasks in _MAPPED_BY.items() if task in tasks]
    mapping: list[int] | None = None
    for head, count in heads:
        kind, found = head.kind, dataset_classes(dataset, head.kind)
        if found is None and len(heads) == 1:  # a head for every class, on a dataset of things alone
            kind, found = "thing", dataset_classes(dataset, "thing")
        if found is None:
            continue
        trained = trained_classes(metadata, head.kind) or trained_classes(metadata, kind)
        if trained is None or count not in (None, len(trained)):
            if count not in (None, len(found)):
                raise ValueError(
                    f"{head.key} = {count}, but dataset {dataset} has {len(found)} {kind} classes "
                    f"({_shown(found)}). Use the dataset that the model was trained on, or train on this one"
                )
            continue
        ours, theirs = [canonical(n) for n in trained], [canonical(n) for n in found]
        if ours == theirs:
            continue
        if sorted(ours) != sorted(theirs):
            raise ValueError(
                f"{source} was trained for {_shown(trained)}; dataset {dataset} has {_shown(found)}. Use a "
                "dataset with the same classes, or train on this one"
            )
        if len(set(ours)) < len(ours) or len(heads) > 1 or task not in _MAPPED_BY[kind]:
            why = "two classes have one name" if len(set(ours)) < len(ours) else f"for the task {task}"
            raise ValueError(
                f"{source} was trained for {_shown(trained)}; dataset {dataset} has {_shown(found)}, the "
                f"same classes in another order, which cannot be mapped ({why}). Use a dataset with the "
                "same order, or train on this one"
            )
        mapping = [theirs.index(name) for name in ours]
    return mapping


def map_classes(output: Mapping[str, Any], mapping: Sequence[int]) -> dict[str, Any]:
    """Return a model's output for one image with the class ids of a dataset.

    Args:
        output: ``instances``, ``sem_seg`` (K, h, w) or ``sem_seg_labels`` (h, w; -1: none) are mapped.
        mapping: class of the model -> class of the dataset. Where several classes of the model belong to one
            of the dataset, its map is their maximum.
    """
    result = dict(output)
    table = torch.tensor(mapping)
    if "instances" in result:
        instances = result["instances"]
        instances.pred_classes = table.to(instances.pred_classes.device)[instances.pred_classes]
    if "sem_seg" in result:
        scores = result["sem_seg"]
        merged = scores.new_full((max(mapping) + 1, *scores.shape[1:]), -torch.inf)
        result["sem_seg"] = merged.index_reduce_(0, table.to(scores.device), scores, "amax")
    if "sem_seg_labels" in result:
        labels = result["sem_seg_labels"]
        mapped = table.to(labels.device)[labels.clamp(min=0).long()].to(labels.dtype)
        result["sem_seg_labels"] = torch.where(labels >= 0, mapped, labels)
    return result


def _shown(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (f", ... ({len(names)} classes)" if len(names) > 8 else "")
